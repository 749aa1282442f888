// No mouse: to a page, into its list, into a dialog and out of it, while the list is refreshed under the focus.

import assert from 'node:assert/strict';
import { play, until } from './stage.mjs';

const focused = (page) => page.evaluate(() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText ?? document.activeElement.tagName);

/** Tabs on until it is there. */
async function tabTo(page, what) {
  for (let i = 0; i < 80; i += 1) {
    await page.keyboard.press('Tab');
    if ((await focused(page)) === what) return;
  }
  assert.fail(`${what} is not reached by Tab`);
}

await play(async (open) => {
  const page = await open();
  await page.getByRole('heading', { name: 'Overview' }).waitFor();
  await page.evaluate(() => document.getElementById('skip').focus());
  assert(await page.getByText('To the content').isVisible());
  await page.keyboard.press('Enter');
  assert.equal(await page.evaluate(() => document.activeElement.id), 'content');
  assert.equal(new URL(page.url()).hash, '#/', 'the same page');
  await page.evaluate(() => document.getElementById('skip').focus());
  await tabTo(page, 'Gateways');
  await page.keyboard.press('Enter');
  await page.getByRole('button', { name: 'Purge gw-2:7000' }).waitFor();
  await tabTo(page, 'Purge gw-2:7000');

  // The list is asked for and drawn again; the focus stays where it is.
  const refreshed = () => page.waitForResponse((response) => response.url().includes('/api/v1/gateways'));
  await refreshed();
  await refreshed();
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  assert.equal(await focused(page), 'Purge gw-2:7000');

  await page.keyboard.press('Enter');
  await page.getByRole('dialog').waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.name), 'reason');
  await page.keyboard.type('by keyboard');
  await page.getByText('would go offline').waitFor();
  assert(await page.getByRole('dialog').getByRole('button', { name: 'Purge' }).isDisabled(), 'the address was not typed yet');
  await page.keyboard.press('Tab');
  await page.keyboard.type('gw-2:7000');
  assert(await page.getByRole('dialog').getByRole('button', { name: 'Purge' }).isEnabled());
  await page.keyboard.press('Escape');
  await until('the dialog is gone', async () => (await page.getByRole('dialog').count()) === 0);
  assert.equal(await focused(page), 'Purge gw-2:7000', 'back where it was opened');

  await page.keyboard.press('Enter');
  await page.getByText('would go offline').waitFor();
  await page.keyboard.type('by keyboard');
  await page.keyboard.press('Tab');
  await page.keyboard.type('gw-2:7000');
  await page.keyboard.press('Enter');
  await page.getByText('1 device went offline').waitFor();
  assert.equal(await focused(page), 'Close');
  await page.keyboard.press('Enter');
  await until('the dialog is gone', async () => (await page.getByRole('dialog').count()) === 0);
});
