// A viewer may look and change nothing: there is no button, and who asks all the same is refused.

import assert from 'node:assert/strict';
import { PAGES, gateways, go, operator, picture, play, signIn, urls, viewer } from './stage.mjs';

await play(async (open) => {
  const page = await open();
  await page.getByText('It is kept in this tab').waitFor();
  await picture(page, 'signin');
  await signIn(page, 'not a token');
  await page.getByText('A token is one line of letters and signs').waitFor();
  await signIn(page, 'impt_wrong');
  await page.getByText('This token does not count any more').waitFor();
  await signIn(page, viewer);
  await page.getByText('viewer, viewer').waitFor();
  for (const each of PAGES) {
    await go(page, each);
    assert.equal(await page.locator('button.act').count(), 0, each[0]);
  }
  const refused = (method, path) => page.evaluate(async ([method, path]) => {
    const headers = { authorization: `Bearer ${sessionStorage.getItem('im-presence.token')}`, 'content-type': 'application/json' };
    return (await fetch(`api/v1/${path}`, { method, headers, body: method === 'DELETE' ? undefined : '{"reason":"x","for_ms":1000}' })).status;
  }, [method, path]);
  const gateway = encodeURIComponent(gateways[0]);
  for (const [method, path] of [['DELETE', `gateways/${gateway}?reason=x`], ['POST', `gateways/${gateway}/drain`], ['PUT', 'hold'], ['POST', 'hold/confirm'],
    ['DELETE', 'hold?reason=x'], ['DELETE', 'users/1/routes?reason=x'], ['DELETE', 'users/1/devices/phone?reason=x'], ['POST', 'users/1/deliver']]) {
    assert.equal(await refused(method, path), 403, `${method} ${path}`);
  }
  assert.equal((await fetch(`${urls[0]}/api/v1/summary`)).status, 401);

  const other = await open('gateways');
  await signIn(other, operator);
  await other.getByRole('button', { name: `Purge ${gateways[0]}` }).waitFor();
  await go(other, ['settings', 'Settings', 'Sign out']);
  await other.getByRole('button', { name: 'Sign out' }).click();
  await other.getByLabel('Token').waitFor();
  assert.equal(await other.evaluate(() => sessionStorage.length), 0);
}, { refusals: true });
