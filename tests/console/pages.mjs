// Every page shows what two real nodes say; and how fast the first one is there.

import assert from 'node:assert/strict';
import { PAGES, gateways, go, picture, play, until } from './stage.mjs';

const NAMES = ['overview', 'gateways', 'gateway', 'users', 'user', 'drains', 'events', 'nodes', 'node', 'doctor', 'settings'];

await play(async (open) => {
  const page = await open();
  await page.getByRole('heading', { name: 'Overview' }).waitFor();
  const figures = await page.evaluate(async () => {
    await new Promise((done) => new PerformanceObserver((entries) => entries.getEntriesByName('first-contentful-paint').length && done()).observe({ type: 'paint', buffered: true }));
    const [paint] = performance.getEntriesByName('first-contentful-paint');
    const loaded = [...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')].filter((entry) => !entry.name.includes('/api/'));
    return { paint: Math.round(paint.startTime), files: loaded.length, bytes: loaded.reduce((sum, entry) => sum + entry.transferSize, 0) };
  });
  console.log(`first contentful paint after ${figures.paint} ms; ${figures.files} files, ${figures.bytes} bytes`);

  assert.equal(await page.locator('#signin').count(), 0, 'without [auth] nobody signs in');
  await until('everybody is counted', async () => (await page.locator('.numbers').innerText()).includes('Users online\n3'));
  await until('the charts are drawn', async () => (await page.locator('canvas').count()) === 4);
  await page.getByRole('link', { name: 'More in Grafana' }).waitFor();
  assert.match(await page.locator('#bar').innerText(), /no sign-in/);

  for (const [i, each] of PAGES.entries()) {
    await go(page, each);
    assert.equal(await page.locator('main [role=alert]:not(:empty)').count(), 0, `${each[0]}: ${await page.locator('main').innerText()}`);
    assert.equal(await page.locator('nav [aria-current=page]').count(), 1);
    if (i > 0) await picture(page, NAMES[i]);
  }

  await go(page, PAGES[4]);
  await page.getByText(/User 1 is online|online/).first().waitFor();
  await page.getByRole('button', { name: 'Send a test message …' }).click();
  await page.getByRole('button', { name: 'Send', exact: true }).click();
  await page.getByText('A device has it: phone').waitFor();
  await picture(page, 'message');
  await page.getByRole('button', { name: 'Close' }).click();

  // Actions leave a trace that the next page shows.
  await page.getByRole('button', { name: 'Take offline …' }).click();
  await page.getByText('Takes off 1 device.').waitFor();
  await page.getByLabel('Reason').fill('a test of the console');
  await page.getByRole('dialog').getByRole('button', { name: 'Take offline' }).click();
  await page.getByText('Took off 1 device.').waitFor();
  await page.getByRole('button', { name: 'Close' }).click();
  await page.getByText('No device is bound.').waitFor();
  await go(page, ['events', 'Events', 'a test of the console']);
  await go(page, ['users', 'Users', gateways[1]]);
  await page.getByLabel('User id', { exact: true }).fill('no number');
  await page.getByRole('button', { name: 'Show' }).click();
  await page.getByText('A user id is a number.').waitFor();
  await page.getByLabel('Region, exactly').fill('nowhere');
  await page.getByLabel('Region, exactly').press('Enter');
  await page.getByText('with region nowhere').waitFor();

  // With charts that have begun, and something that has happened.
  await go(page, PAGES[0]);
  await until('the charts are drawn', async () => (await page.locator('canvas').count()) === 4);
  await picture(page, NAMES[0], true);
});
