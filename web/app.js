// The frame around every page: who asks, how the system is, a hold that is on, and which page is shown.

import { Problem, get, onSignedOut, token } from './api.js';
import { ask } from './dialog.js';
import { fill, h, link, notice } from './dom.js';
import { clock, count, countdown, plural, span, when } from './format.js';
import { endCharts, redrawCharts } from './chart.js';
import { begin, isSilent, leave, live, mayAct, role } from './live.js';
import { beginHold, confirmHold, endHold } from './actions.js';

const PAGES = {
  '': () => import('./pages/overview.js'),
  gateways: (path) => (path.length > 1 ? import('./pages/gateway.js') : import('./pages/gateways.js')),
  users: (path) => (path.length > 1 ? import('./pages/user.js') : import('./pages/users.js')),
  drains: () => import('./pages/drains.js'),
  events: () => import('./pages/events.js'),
  nodes: () => import('./pages/nodes.js'),
  doctor: () => import('./pages/doctor.js'),
  settings: () => import('./pages/settings.js'),
};
const NAV = [['', 'Overview'], ['gateways', 'Gateways'], ['users', 'Users'], ['drains', 'Drains'], ['events', 'Events'], ['nodes', 'Nodes'], ['doctor', 'Doctor'], ['settings', 'Settings']];
const element = (id) => document.getElementById(id);

let page;

function place() {
  const [path, search] = location.hash.replace(/^#\/?/, '').split('?');
  return { path: path.split('/').map(decodeURIComponent), query: Object.fromEntries(new URLSearchParams(search)) };
}

/** Shows the page that the address names. */
async function go() {
  const { path, query } = place();
  // Other filters of the same page: whoever set one goes on from there.
  const focus = page?.path.join('/') === path.join('/') ? document.activeElement?.id : undefined;
  if (!element('signin') && page) close();
  const mine = { path, query, focus, stop: new AbortController(), problem: undefined, loaded: false };
  page = mine;
  nav();
  const load = PAGES[path[0]] ?? PAGES[''];
  try {
    const module = await load(path);
    if (page !== mine) return;
    mine.view = module.open({ path: path.slice(1), query, redraw: () => draw(mine), reload: () => refresh(mine), search });
  } catch (error) {
    mine.view = { title: 'This page', show: () => [] };
    mine.problem = new Problem(0, { detail: `the page could not be loaded: ${error.message}` });
  }
  document.title = `${mine.view.title} · im-presence`;
  draw(mine);
  element('content').focus({ preventScroll: true });
  if (!focus) scrollTo(0, 0);
  refresh(mine);
}

function close() {
  page.stop.abort();
  clearTimeout(page.timer);
  endCharts();
  page.view?.close?.();
  page = undefined;
  fill(element('content'));
}

/** Other filters for the page that is shown: they stand in its address, so that it can be passed on. */
function search(params) {
  const given = Object.entries(params).filter(([, value]) => value);
  location.hash = `#/${page.path.map(encodeURIComponent).join('/')}${given.length ? `?${new URLSearchParams(given)}` : ''}`;
}

/** Asks for what the page shows; one question at a time, and none while nobody looks. */
async function refresh(mine) {
  clearTimeout(mine.timer);
  if (page !== mine || !mine.view.load) return;
  mine.asking?.abort();
  const asking = new AbortController();
  mine.asking = asking;
  if (!document.hidden) {
    try {
      await mine.view.load(AbortSignal.any([mine.stop.signal, asking.signal]));
      Object.assign(mine, { problem: undefined, loaded: true });
    } catch (error) {
      if (page !== mine || mine.asking !== asking || error.name === 'AbortError') return;
      mine.problem = error instanceof Problem ? error : new Problem(0, { detail: `unexpected: ${error.message}` });
      if (!(error instanceof Problem)) console.error(error);
    }
    if (page !== mine || mine.asking !== asking) return;
    draw(mine);
  }
  if (mine.view.every) mine.timer = setTimeout(() => refresh(mine), mine.problem ? Math.max(mine.view.every, 5000) : mine.view.every);
}

function draw(mine) {
  if (page !== mine || element('signin')) return;
  const { view, problem } = mine;
  const waits = view.load && !mine.loaded;
  fill(element('content'),
    h('h1', { key: 'title' }, view.heading?.() ?? view.title),
    problem && h('div', { key: 'problem', role: 'alert' }, trouble(problem, mine, waits)),
    waits ? !problem && h('p', { key: 'loading', class: 'empty', role: 'status' }, 'Loading …') : view.show());
  quieten();
  redrawCharts();
  if (mine.focus && !waits) element(mine.focus)?.focus();
  if (!waits) mine.focus = undefined;
}

function trouble(problem, mine, waits) {
  if (problem.status === 403) return notice('warn', `Your role, ${role()}, may not see this. `, problem.message);
  const again = h('button', { type: 'button', onclick: () => refresh(mine) }, 'Try again');
  return notice('bad', waits ? 'This cannot be shown: ' : 'What is below was not refreshed: ', problem.message, ' ', again);
}

// === what stands on every page ===

function nav() {
  const [first] = place().path;
  fill(element('nav'), NAV.map(([path, text]) =>
    h('a', { href: `#/${path}`, 'aria-current': (first || '') === path ? 'page' : undefined }, text)));
}

const WORDS = { ok: ['good', 'All is well'], healthy: ['good', 'All is well'], degraded: ['warn', 'Degraded'], down: ['bad', 'Down'], unavailable: ['bad', 'Unavailable'] };

function bar() {
  const { summary } = live;
  const silent = isSilent();
  document.body.classList.toggle('silent', silent);
  const [how, word] = WORDS[summary?.verdict] ?? ['idle', summary?.verdict ?? 'Asking …'];
  const state = silent ? silence() : h('span', null, h('strong', null, word), summary?.because?.length ? `: ${summary.because[0]}` : '');
  const parts = [h('div', { key: 'verdict', class: `verdict ${silent ? 'idle' : how}`, role: 'status' }, state)];
  if (summary) {
    const counted = summary.users_as_of_ms ? `, ${span(summary.as_of_ms - summary.users_as_of_ms)} ago` : '';
    parts.push(h('div', { key: 'facts', class: 'about' },
      h('span', null, `${count(summary.users_online)} users online`, h('small', null, counted)),
      h('span', null, 'node ', summary.node_id ? link(summary.node_id, 'nodes', summary.node_id) : location.host),
      h('span', null, silent ? 'silent' : live.problem ? 'no answer' : 'live'),
      h('span', null, summary.caller?.name ? `${summary.caller.name}, ${role()}` : 'no sign-in')));
  }
  fill(element('bar'), parts);
  hold(silent);
}

function silence() {
  const since = Math.round((Date.now() - live.heardAt) / 1000);
  // The seconds are not read out each second: that would be all a screen reader says.
  return live.heardAt
    ? [h('strong', null, 'No answer'), h('span', { 'aria-hidden': 'true' }, ` for ${since} s`), `: numbers are from ${clock(live.heardAt)}`]
    : [h('strong', null, 'No answer'), ` from ${location.host} yet: ${live.problem.message}`];
}

function hold(silent) {
  const { hold: on, as_of_ms: asOf } = live.summary ?? {};
  if (!on) return fill(element('hold'));
  const left = Math.max(0, on.until_ms - asOf - (silent ? 0 : Date.now() - live.heardAt));
  return fill(element('hold'), h('section', { 'aria-label': 'Hold', class: 'hold' },
    h('p', null, h('strong', null, 'Hold: '), on.silent ? `${plural(on.silent, 'gateway is', 'gateways are')} silent` : 'no gateway is silent',
      on.reason ? ` (${on.reason})` : '', on.silent ? '. Their users stay online for ' : '. It lasts for ', h('strong', { role: 'timer' }, countdown(left)), ', until ', when(on.until_ms),
      on.silent ? '; then, if nobody does anything, these gateways are declared dead and their users go offline.' : '; nobody is declared dead until then.'),
    mayAct() && h('p', { class: 'buttons' },
      h('button', { type: 'button', class: 'act', onclick: () => beginHold(page && (() => refresh(page)), true) }, 'Prolong …'),
      h('button', { type: 'button', class: 'act', onclick: () => endHold(page && (() => refresh(page))) }, 'End the hold …'),
      h('button', { type: 'button', class: 'act danger', onclick: () => confirmHold(page && (() => refresh(page))) }, 'They are dead: confirm …'))));
}

/** Nothing is changed by somebody who sees old numbers. */
function quieten() {
  const silent = isSilent();
  for (const button of document.querySelectorAll('button.act')) button.disabled = silent;
}

live.changed = () => {
  if (element('signin')) return;
  bar();
  if (page?.view?.live) draw(page);
  quieten();
};
setInterval(() => (live.problem || live.summary?.hold) && live.changed(), 1000);

// === signing in ===

onSignedOut.call = (hadToken) => {
  token.forget();
  leave();
  document.querySelectorAll('dialog').forEach((dialog) => dialog.close());
  signIn(hadToken ? 'This token does not count any more: it was revoked, has expired, or was never one.' : undefined);
};

function signIn(why) {
  if (page) close();
  Object.assign(live, { summary: undefined, problem: undefined, heardAt: 0, samples: [], events: [] });
  document.body.classList.remove('silent');
  for (const id of ['bar', 'nav', 'hold']) fill(element(id));
  document.title = 'Sign in · im-presence';
  const submit = async (event) => {
    event.preventDefault();
    const value = element('token').value.trim();
    if (!/^[\x21-\x7e]+$/.test(value)) return signIn('A token is one line of letters and signs, without spaces.');
    token.set(value);
    return start();
  };
  fill(element('content'), h('form', { id: 'signin', key: 'signin', class: 'signin', onsubmit: submit, novalidate: true },
    h('h1', null, 'im-presence'),
    h('div', { role: 'alert' }, why && notice('bad', why)),
    h('p', { class: 'field' }, h('label', { for: 'token' }, 'Token'),
      h('input', { id: 'token', type: 'password', autocomplete: 'off', spellcheck: 'false', 'aria-describedby': 'token-hint' }),
      h('small', { id: 'token-hint' }, 'Of the role viewer or operator. It is kept in this tab until you sign out or close it.')),
    h('p', { class: 'buttons' }, h('button', { type: 'submit', class: 'primary' }, 'Sign in')),
    h('p', null, h('small', null, 'A token is made by ', h('code', null, 'im-presence token new --role viewer --name you'), '.'))));
  element('token').value = '';
  element('token').focus();
}

async function start() {
  try {
    // One question decides whether a token is needed, and whether this one is good.
    const summary = await get(['summary']);
    Object.assign(live, { summary, heardAt: Date.now(), problem: undefined });
  } catch (problem) {
    if (problem.status === 401) return;
    if (problem.status === 403) {
      token.forget();
      signIn('This token is of a role that may not look at the console: viewer or operator is needed.');
      return;
    }
    live.problem = problem;
  }
  fill(element('content'));
  bar();
  begin();
  go();
}

element('skip').onclick = (event) => {
  event.preventDefault(); // an address of its own would be another page
  element('content').focus();
};
addEventListener('hashchange', () => (element('signin') ? undefined : go()));
document.addEventListener('visibilitychange', () => !document.hidden && page && refresh(page));
const theme = localStorage.getItem('im-presence.theme');
if (theme) document.documentElement.dataset.theme = theme;
start();
