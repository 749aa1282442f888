// A drain, ordered on the console: its number reaches 0.

import assert from 'node:assert/strict';
import { gateways, go, picture, play, until } from './stage.mjs';

await play(async (open) => {
  const page = await open('gateways');
  await page.getByRole('button', { name: `Drain ${gateways[0]}` }).click();
  const dialog = page.getByRole('dialog');
  await dialog.getByText(/Moves \d+,?\d* users/).waitFor();
  const users = Number((await dialog.getByText(/Moves \d+,?\d* users/).innerText()).match(/Moves ([\d,]+) users/)[1].replace(',', ''));
  assert(users >= 200, `${users} users`);
  await dialog.getByLabel('Users per second').fill('0');
  await dialog.getByText('Users per second: at least 1.').waitFor();
  await dialog.getByLabel('Reason').fill('a new version');
  assert(await dialog.getByRole('button', { name: 'Drain', exact: true }).isDisabled(), 'nothing is ordered that the fields do not allow');
  await dialog.getByLabel('Users per second').fill(users > 500 ? '50' : '10'); // it has to be looked at before it is over
  await dialog.getByLabel('If the others lack room').selectOption('yes');
  await dialog.getByLabel('Reason').fill('a new version');
  await dialog.getByText(`Moves ${users.toLocaleString('en')} users`).waitFor();
  await dialog.getByRole('button', { name: 'Drain', exact: true }).click();
  await dialog.getByText('Draining').waitFor();
  await dialog.getByRole('button', { name: 'Close' }).click();

  await go(page, ['drains', 'Drains', gateways[0]]);
  const left = async () => {
    const text = await page.locator('main').innerText();
    const running = /([\d,]+) users? left of/.exec(text);
    return running ? Number(running[1].replace(',', '')) : /done/.test(text) ? 0 : users;
  };
  await until('some have gone and some have not', async () => { const n = await left(); return n > 0 && n < users; });
  await page.getByText('reason: a new version').waitFor();
  await picture(page, 'drains');
  await page.getByRole('button', { name: `Change the drain of ${gateways[0]}` }).waitFor();
  await until('nobody is left', async () => (await left()) === 0);
  await page.locator('table', { hasText: 'Drains that are over' }).getByText('done').waitFor();
});
