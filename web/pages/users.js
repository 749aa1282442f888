// Finds a user by id, or lists who is online.

import { get } from '../api.js';
import { badge, empty, h, link, notice, table, to } from '../dom.js';
import { count, plural, span, when } from '../format.js';

const STATUSES = ['', 'online', 'away', 'busy', 'invisible'];
const PLATFORMS = ['', 'ios', 'android', 'windows', 'macos', 'linux', 'web', 'tablet', 'other'];
const OLD_MS = 90_000;
const HOW = { online: 'good', away: 'warn', busy: 'warn' };

/** What a device says it is. */
export const platform = (name) => (name === 'unspecified' ? 'not told' : name);
export const shownBadge = (status) => badge(status ?? 'unknown', HOW[status] ?? 'idle');

export function userTable(users, caption) {
  const distinct = (values) => [...new Set(values)];
  return table(caption, ['User', 'Shown as', 'Gateway', { title: 'Devices', number: true }, 'Platforms', 'Since'],
    users.map((user) => ({ key: user.user_id, cells: [
      link(user.user_id, 'users', user.user_id), [shownBadge(user.shown), user.wanted === 'invisible' ? ' hides' : ''],
      distinct(user.routes.map((route) => route.gateway_addr)).map((addr, i) => [i ? ', ' : '', link(addr, 'gateways', addr)]),
      count(user.routes.length), distinct(user.routes.map((route) => platform(route.platform))).join(', '), when(user.status_since_ms)] })));
}

export function open({ query, redraw, reload, search }) {
  let answer;
  let counts;
  const cursors = [undefined];
  const turn = (back) => { if (back) cursors.pop(); else cursors.push(answer.next_cursor); reload(); redraw(); };
  return {
    title: 'Users',
    every: 10_000,
    async load(signal) {
      const [listed, counted] = await Promise.all([
        get(['users'], { ...query, limit: 100, cursor: cursors.at(-1) }, signal),
        get(['counts'], { by: 'status' }, signal).catch((problem) => { if (problem.status === 503) return undefined; throw problem; }),
      ]);
      answer = listed;
      counts = counted;
    },
    show: () => [find(), counted(counts), filters(query, search), list(answer, query), pages(answer, cursors, turn)],
  };
}

function find() {
  const submit = (event) => {
    event.preventDefault();
    const field = document.getElementById('user-id');
    const id = field.value.trim();
    const fits = /^\d{1,19}$/.test(id);
    field.setAttribute('aria-invalid', String(!fits));
    document.getElementById('user-id-wrong').textContent = fits ? '' : 'A user id is a number.';
    if (fits) location.hash = to('users', id);
  };
  return h('form', { key: 'find', class: 'filters', role: 'search', 'aria-label': 'Find a user', onsubmit: submit, novalidate: true },
    h('p', { class: 'field' }, h('label', { for: 'user-id' }, 'User id'),
      h('input', { id: 'user-id', inputmode: 'numeric', autocomplete: 'off', 'aria-describedby': 'user-id-wrong' })),
    h('p', { class: 'field' }, h('button', { type: 'submit', class: 'primary' }, 'Show')),
    h('p', { id: 'user-id-wrong', role: 'alert', keep: () => {} }));
}

function counted(counts) {
  if (!counts) return h('p', { key: 'counts', class: 'soft' }, 'Nobody has been counted yet: that is done once a minute.');
  const age = Date.now() - counts.as_of_ms;
  const each = counts.items.filter((item) => item.users > 0).map((item) => `${count(item.users)} ${item.key}`).join(', ');
  return [h('p', { key: 'counts', class: 'soft' }, `${plural(counts.users, 'user')} online${each ? `: ${each}` : ''}. Counted ${span(age)} ago.`),
    age > OLD_MS && notice('warn', `The count is ${span(age)} old; it is made once a minute.`)];
}

function filters(query, search) {
  const change = (name) => (event) => search({ ...query, [name]: event.target.value.trim() });
  const field = (name, label, control) => h('p', { class: 'field' }, h('label', { for: `filter-${name}` }, label), control);
  const choice = (name, options) => h('select', { id: `filter-${name}`, onchange: change(name) },
    options.map((option) => h('option', { value: option, selected: (query[name] ?? '') === option }, option || 'any')));
  const text = (name) => h('input', { id: `filter-${name}`, value: query[name] ?? '', onchange: change(name) });
  return h('form', { key: 'filters', class: 'filters', 'aria-label': 'Filter who is online', onsubmit: (event) => event.preventDefault() },
    field('gateway', 'Gateway, exactly', text('gateway')), field('region', 'Region, exactly', text('region')),
    field('platform', 'Platform', choice('platform', PLATFORMS)), field('status', 'Status', choice('status', STATUSES)));
}

function list(answer, query) {
  if (answer.items.length) return userTable(answer.items, 'Who is online, by user id');
  const given = Object.entries(query).filter(([, value]) => value).map(([name, value]) => `${name} ${value}`).join(', ');
  const more = answer.next_cursor ? 'Nobody on this page' : 'Nobody is online';
  return empty(given ? `${more} with ${given}.` : `${more}.`);
}

function pages(answer, cursors, turn) {
  if (!answer.next_cursor && cursors.length === 1) return undefined;
  return h('p', { key: 'pages', class: 'buttons' }, `Page ${cursors.length} `,
    h('button', { key: 'back', type: 'button', disabled: cursors.length === 1, onclick: () => turn(true) }, 'Back'),
    h('button', { key: 'next', type: 'button', disabled: !answer.next_cursor, onclick: () => turn(false) }, 'Next'));
}
