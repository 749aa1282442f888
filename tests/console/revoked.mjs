// The token is taken out of the file while the page is open.

import assert from 'node:assert/strict';
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { gateways, operator, play, signIn, tokensFile } from './stage.mjs';

await play(async (open) => {
  const page = await open('gateways');
  await signIn(page, operator);
  await page.getByRole('button', { name: `Purge ${gateways[0]}` }).click();
  await page.getByRole('dialog').getByText('would go offline').waitFor();
  const entries = readFileSync(tokensFile, 'utf8').split('[[token]]').filter((entry) => !entry.includes('"operator"'));
  writeFileSync(`${tokensFile}.new`, entries.join('[[token]]'));
  renameSync(`${tokensFile}.new`, tokensFile);

  await page.getByLabel('Token').waitFor();
  await page.getByText('This token does not count any more').waitFor();
  assert.equal(await page.getByRole('dialog').count(), 0);
  assert(!(await page.locator('body').innerText()).includes(gateways[0]), 'nothing is left of what it showed');
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
}, { refusals: true });
