// What strangers may write stays what it is: text.

import assert from 'node:assert/strict';
import { PAGES, accessible, fits, go, play } from './stage.mjs';

const EVIL = '<img/src=x/onerror=alert(1)>';
const gateway = `${EVIL}:7000`;
const clean = async (page, where) => {
  const made = await page.evaluate(() => [...document.querySelectorAll('img, iframe, object, script:not([type=module]), main svg:not(.days), [onerror], [onload]')].map((element) => element.outerHTML));
  assert.deepEqual(made, [], where);
};

await play(async (open) => {
  for (const width of [375, 1280]) {
    const page = await open('', { width });
    const hostile = [
      ['gateways', 'Gateways', gateway],
      [`gateways/${encodeURIComponent(gateway)}`, gateway, `label = ${EVIL}label`],
      ['users/1', 'User 1', '<svg"onload=alert(1)>'],
      ['nodes', 'Nodes', `${EVIL}node`],
      [`nodes/${encodeURIComponent(`${EVIL}node`)}`, EVIL, 'Configuration in force'],
      [`users?region=${encodeURIComponent(EVIL)}`, 'Users', `region ${EVIL}`],
      [`users?gateway=${encodeURIComponent(gateway)}`, 'Users', '1'],
    ];
    for (const each of [...hostile, ...PAGES]) {
      await go(page, each);
      await clean(page, each[0]);
      await fits(page, `${each[0]} at ${width} px`);
    }
    await go(page, ['users/1', 'User 1', `${EVIL}<script>alert(1)</script>`]);
    await accessible(page, 'a user with hostile text');
    if (width === 375) continue;

    // What an operator writes is shown to the next one.
    await go(page, hostile[0]);
    await page.getByRole('button', { name: 'Hold …' }).click();
    await page.getByText('is declared dead for').waitFor();
    await page.getByLabel('Reason').fill(`${EVIL}reason`);
    await page.getByRole('dialog').getByRole('button', { name: 'Hold', exact: true }).click();
    await page.getByText('The hold is on.').waitFor();
    await page.getByRole('button', { name: 'Close' }).click();
    await page.getByRole('region', { name: 'Hold' }).getByText(`${EVIL}reason`).waitFor();
    await go(page, hostile[2]);
    await page.getByRole('button', { name: 'Kick <svg"onload=alert(1)>' }).click();
    await page.getByText('Takes off 1 device.').waitFor();
    await page.getByLabel('Reason').fill(`${EVIL}kick`);
    await page.getByRole('dialog').getByRole('button', { name: 'Kick' }).click();
    await page.getByText('Kicked.').waitFor();
    await page.getByRole('button', { name: 'Close' }).click();
    await go(page, ['events', 'Events', `${EVIL}kick`]);
    await clean(page, 'events');
  }
});
