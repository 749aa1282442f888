// A node is killed: its own console says since when the numbers are old and lets nobody act; the other's says who is missing.

import assert from 'node:assert/strict';
import { gateways, go, nodePids, picture, play, until, urls } from './stage.mjs';

await play(async (open) => {
  const [own, other] = [await open('gateways', { url: urls[1] }), await open('nodes', { url: urls[0] })];
  await own.getByText(gateways[0]).first().waitFor();
  await other.getByText('node-2').first().waitFor();
  assert(await own.getByRole('button', { name: 'Purge gw-1:7000' }).isEnabled());
  process.kill(nodePids[1], 'SIGKILL');

  await own.locator('body.silent').waitFor();
  assert.match(await own.locator('#bar').innerText(), /No answer for \d+ s: numbers are from \d\d:\d\d:\d\dZ/);
  await until('actions are off', async () => own.getByRole('button', { name: 'Purge gw-1:7000' }).isDisabled());
  await own.getByText('What is below was not refreshed').waitFor();
  assert(await own.getByText(gateways[2]).first().isVisible(), 'what was known stays');
  await picture(own, 'silent');

  await go(other, ['nodes/node-2', 'Node node-2', 'It does not answer']);
  await go(other, ['', 'Overview', 'node-2']);
  await until('the verdict is not that all is well', async () => !(await other.locator('#bar').innerText()).includes('All is well'));
}, { refusals: true });
