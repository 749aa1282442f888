// From a phone to a wall.

import { PAGES, fits, go, picture, play } from './stage.mjs';

await play(async (open) => {
  for (const [width, height] of [[375, 667], [768, 1024], [1280, 900], [3840, 2160]]) {
    const page = await open('', { width, height });
    for (const each of PAGES) {
      await go(page, each);
      await fits(page, `${each[0]} at ${width} px`);
      if (width === 375 && each[1] === 'Gateways') await picture(page, 'phone');
    }
    await go(page, PAGES[1]);
    await page.getByRole('button', { name: 'Drain gw-1:7000' }).click();
    await page.getByText('Moves').waitFor();
    await fits(page, `a dialog at ${width} px`);
    await page.context().close();
  }
});
