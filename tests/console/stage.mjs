// What the cases share: the servers that were started for them, a browser, and what no page may ever do.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import assert from 'node:assert/strict';

const require = createRequire(`${process.env.CONSOLE_MODULES}/package.json`);
const { chromium } = require('playwright-core');
const AXE = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');

const list = (name) => (process.env[name] ?? '').split(' ').filter(Boolean);
export const urls = list('CONSOLE_URLS');
export const nodePids = list('CONSOLE_NODE_PIDS').map(Number);
export const gatewayPids = list('CONSOLE_GATEWAY_PIDS').map(Number);
export const gateways = list('CONSOLE_GATEWAYS');
export const { CONSOLE_TOKENS_FILE: tokensFile, CONSOLE_VIEWER: viewer, CONSOLE_OPERATOR: operator, CONSOLE_PICTURES: pictures } = process.env;

/** A state that is waited for; a machine under load takes its time. */
export const PATIENCE_MS = 90_000;

/** Every page, and something that it shows of these servers. */
export const PAGES = [
  ['', 'Overview', 'node-2'],
  ['gateways', 'Gateways', gateways[1]],
  [`gateways/${encodeURIComponent(gateways[0])}`, gateways[0], 'goes on'],
  ['users', 'Users', gateways[0]],
  ['users/1', 'User 1', 'What each tier says'],
  ['drains', 'Drains', 'No drain runs'],
  ['events', 'Events', 'Who did what'],
  ['nodes', 'Nodes', 'node-1'],
  ['nodes/node-1', 'Node node-1', 'Configuration in force'],
  ['doctor', 'Doctor', 'Look again'],
  ['settings', 'Settings', 'Appearance'],
];

/** Asks again until the answer is yes. */
export async function until(what, ask) {
  const began = Date.now();
  for (;;) {
    if (await ask()) return;
    assert(Date.now() - began < PATIENCE_MS, `never: ${what}`);
    await new Promise((done) => setTimeout(done, 100));
  }
}

/**
 * Runs a case in a browser.
 * @param {object} options `refusals`: answers that are no success are expected, so the browser's notes of them are, too.
 */
export async function play(run, { refusals = false } = {}) {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ['--no-sandbox', '--disable-dev-shm-usage'], timeout: PATIENCE_MS });
  const faults = [];
  /** A tab of its own, with its own session. */
  async function open(path = '', { url = urls[0], width = 1280, height = 900, colorScheme = 'light' } = {}) {
    const context = await browser.newContext({ viewport: { width, height }, colorScheme, reducedMotion: 'reduce' });
    context.setDefaultTimeout(PATIENCE_MS);
    const page = await context.newPage();
    page.on('pageerror', (error) => faults.push(`error: ${error.message}`));
    page.on('dialog', (dialog) => { faults.push(`a script ran: ${dialog.message()}`); dialog.dismiss(); });
    page.on('console', (message) => {
      const expected = refusals && message.text().startsWith('Failed to load resource');
      if (['error', 'warning'].includes(message.type()) && !expected) faults.push(`console: ${message.text()}`);
    });
    page.on('request', (request) => {
      if (!request.url().startsWith(url) && !request.url().startsWith('data:')) faults.push(`asked a stranger: ${request.url()}`);
    });
    await page.addInitScript(() => {
      window.violations = [];
      addEventListener('securitypolicyviolation', (event) => window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`));
    });
    await page.goto(`${url}/#/${path}`);
    return page;
  }
  try {
    await run(open, faults);
    for (const page of browser.contexts().flatMap((context) => context.pages())) faults.push(...await page.evaluate(() => window.violations));
    assert.deepEqual(faults, []);
  } catch (error) {
    for (const page of browser.contexts().flatMap((context) => context.pages())) {
      console.log(`--- ${page.url()}\n${await page.evaluate(() => document.body.innerText).catch(() => 'no text')}`);
    }
    console.log(faults.join('\n'));
    throw error;
  } finally {
    await browser.close();
  }
}

/** Another page of the console, loaded with what it shows. */
export async function go(page, [path, heading, shows]) {
  await page.evaluate((hash) => { location.hash = hash; }, `#/${path}`);
  await page.locator('h1', { hasText: heading }).waitFor();
  await page.getByText(shows).first().waitFor();
  await until(`${path} is loaded`, () => page.evaluate(() => !document.querySelector('main').innerText.includes('Loading …')));
}

export async function signIn(page, token) {
  await page.getByLabel('Token').fill(token);
  await page.getByRole('button', { name: 'Sign in' }).click();
}

/** Nothing is wider than the screen. */
export async function fits(page, what) {
  const wide = await page.evaluate(() => {
    const { scrollWidth, clientWidth } = document.documentElement;
    if (scrollWidth <= clientWidth) return [];
    return [...document.querySelectorAll('body *')].filter((element) => element.getBoundingClientRect().right > clientWidth + 1)
      .slice(0, 5).map((element) => `${element.tagName}.${element.className}: ${element.getBoundingClientRect().right} of ${clientWidth}`);
  });
  assert.deepEqual(wide, [], what);
  // Where rows are cards, each part of a cell would be a column of its own.
  const split = await page.evaluate(() => [...document.querySelectorAll('td')].filter((cell) => cell.childNodes.length > 1).map((cell) => cell.innerText).slice(0, 5));
  assert.deepEqual(split, [], what);
}

/** What axe-core calls serious or critical. */
export async function accessible(page, what) {
  await page.evaluate(AXE);
  const found = await page.evaluate(async () => {
    const { violations } = await window.axe.run(document, { resultTypes: ['violations'] });
    return violations.map(({ id, impact, nodes }) => ({ id, impact, nodes: nodes.slice(0, 3).map((node) => `${node.target}: ${node.any.map((check) => check.message).join('; ')}`) }));
  });
  const serious = found.filter(({ impact }) => ['serious', 'critical'].includes(impact));
  assert.deepEqual(serious, [], what);
  return found.map(({ id, impact }) => `${id} (${impact})`);
}

export async function picture(page, name, fullPage = false) {
  if (pictures) await page.screenshot({ path: `${pictures}/${name}.png`, fullPage });
}
