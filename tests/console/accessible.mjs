// axe-core on each page, in both colours, with a dialog open, too.

import { PAGES, accessible, go, picture, play } from './stage.mjs';

await play(async (open) => {
  for (const colorScheme of ['light', 'dark']) {
    const page = await open('', { colorScheme });
    const lesser = new Set();
    for (const each of PAGES) {
      await go(page, each);
      (await accessible(page, `${each[0]} in ${colorScheme}`)).forEach((finding) => lesser.add(finding));
    }
    console.log(`${PAGES.length} pages in ${colorScheme}: 0 serious or critical, lesser: ${[...lesser].join(', ') || 'none'}`);
    if (colorScheme === 'dark') { await go(page, PAGES[0]); await page.locator('canvas').nth(3).waitFor(); await picture(page, 'dark'); }
    await go(page, PAGES[1]);
    await page.getByRole('button', { name: 'Purge gw-1:7000' }).click();
    await page.getByText('would go offline').waitFor();
    await accessible(page, `a dialog in ${colorScheme}`);
    if (colorScheme === 'light') await picture(page, 'purge');
  }
});
