// Two of three gateways fall silent: nobody is taken offline, the console says what happens if nobody does anything, and somebody confirms.

import assert from 'node:assert/strict';
import { gatewayPids, gateways, go, picture, play, until } from './stage.mjs';

await play(async (open) => {
  const page = await open('gateways');
  await page.getByText('3 gateways').waitFor();
  for (const pid of gatewayPids.slice(0, 2)) process.kill(pid, 'SIGSTOP');
  const banner = page.getByRole('region', { name: 'Hold' });
  await banner.getByText('2 gateways are silent').waitFor();
  await banner.getByText('if nobody does anything, these gateways are declared dead').waitFor();
  await until('both are shown held', async () => (await page.locator('main td .badge.bad', { hasText: 'held' }).count()) === 2);
  const left = async () => {
    const [minutes, seconds] = (await banner.getByRole('timer').innerText()).split(':').map(Number);
    return minutes * 60 + seconds;
  };
  const before = await left();
  await until('the time left gets shorter', async () => (await left()) < before);
  await picture(page, 'hold');
  await go(page, ['users/1', 'User 1', 'online']);
  await page.locator('.because', { hasText: /suspect|online/ }).waitFor();

  await page.getByRole('cell', { name: /^over for / }).waitFor();

  await banner.getByRole('button', { name: 'Prolong …' }).click();
  const longer = page.getByRole('dialog');
  await longer.getByLabel('Reason').fill('we look at the switch');
  await longer.getByLabel('For how many minutes').fill('20');
  await longer.getByRole('button', { name: 'Prolong it' }).click(); // as soon as it may be, and once
  await longer.getByText('The hold is on.').waitFor();
  await longer.getByRole('button', { name: 'Close' }).click();
  await until('it lasts longer', async () => (await left()) > 600);

  await banner.getByRole('button', { name: 'They are dead: confirm …' }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByText('Ends 2 lives of gateways; 2 devices would go offline now.').waitFor();
  assert(await dialog.getByRole('button', { name: 'They are dead' }).isDisabled(), 'a reason is required');
  await dialog.getByLabel('Reason').fill('the rack is on fire');
  await dialog.getByRole('button', { name: 'They are dead' }).click();
  await dialog.getByText('Ended 2 lives').waitFor();
  await dialog.getByRole('button', { name: 'Close' }).click();
  await until('the hold is over', async () => (await banner.count()) === 0);
  await page.getByText('No device is bound.').waitFor();
  await go(page, [`gateways/${encodeURIComponent(gateways[0])}`, gateways[0], 'No life of this gateway goes on']);
  await page.getByRole('cell', { name: 'operator' }).waitFor();
  await go(page, ['events', 'Events', 'the rack is on fire']);
  await page.locator('.events li', { hasText: gateways[0] }).first().waitFor();
});
