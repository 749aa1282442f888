// Which gateways are silent, is a hold on, and what happens if nobody does anything?

import { get } from '../api.js';
import { beginHold, drain, purge, rebalance } from '../actions.js';
import { badge, empty, h, link, table } from '../dom.js';
import { count, left, percent, plural, span } from '../format.js';
import { live, mayAct } from '../live.js';

/** The worst first. */
const TROUBLE = ['held', 'late', 'draining', 'alive', 'unmanaged', 'over'];
const HOW = { held: 'bad', late: 'warn', draining: 'warn', alive: 'good' };
const PAGE = 1000;

export const stateBadge = (state) => badge(state, HOW[state] ?? 'idle');
/** Only who is silent is sorted by the lease: the others would change places at each beat, under somebody's hand. */
const silence = (gateway) => (['held', 'late'].includes(gateway.state) ? gateway.lease_left_ms ?? 0 : 0);
const trouble = (gateway) => (TROUBLE.indexOf(gateway.state) + TROUBLE.length) % TROUBLE.length;

/** The lease as a bar; for who does not see it, as a text. */
export function lease(gateway, longest) {
  const ms = gateway.lease_left_ms;
  if (ms === undefined || ms === null) return '–';
  const label = left(ms);
  return h('span', { class: 'lease' }, h('progress', { max: Math.max(1, longest), value: Math.max(0, ms), 'aria-label': `lease left: ${label}` }), ' ', label);
}

export function open({ query, redraw, reload, search }) {
  let answer;
  let cursors = [undefined];
  const { state, region, prefix } = query;
  const shown = () => [...answer.items].sort((a, b) => trouble(a) - trouble(b) || silence(a) - silence(b) || (a.gateway_addr < b.gateway_addr ? -1 : 1));
  const turn = (back) => { if (back) cursors.pop(); else cursors.push(answer.next_cursor); reload(); redraw(); };
  return {
    title: 'Gateways',
    every: 3000,
    async load(signal) {
      answer = await get(['gateways'], { state, region, prefix, limit: PAGE, cursor: cursors.at(-1) }, signal);
    },
    show: () => [filters(query, search), buttons(reload), rows(shown(), query), pages(answer, cursors, turn)],
  };
}

function filters(query, search) {
  const change = (name) => (event) => search({ ...query, [name]: event.target.value });
  const field = (name, label, control) => h('p', { class: 'field' }, h('label', { for: `filter-${name}` }, label), control);
  return h('form', { key: 'filters', class: 'filters', role: 'search', 'aria-label': 'Filter gateways', onsubmit: (event) => event.preventDefault() },
    field('state', 'State', h('select', { id: 'filter-state', onchange: change('state') },
      ['', ...TROUBLE].map((state) => h('option', { value: state, selected: (query.state ?? '') === state }, state || 'any')))),
    field('region', 'Region', h('input', { id: 'filter-region', value: query.region ?? '', onchange: change('region') })),
    field('prefix', 'Address begins with', h('input', { id: 'filter-prefix', value: query.prefix ?? '', onchange: change('prefix') })));
}

function buttons(reload) {
  if (!mayAct()) return undefined;
  return h('p', { key: 'buttons', class: 'buttons' },
    !live.summary?.hold && h('button', { type: 'button', class: 'act', onclick: () => beginHold(reload) }, 'Hold …'),
    h('button', { type: 'button', class: 'act', onclick: () => rebalance(reload) }, 'Level the loads …'));
}

function rows(gateways, query) {
  if (!gateways.length) {
    const given = Object.entries(query).filter(([, value]) => value).map(([name, value]) => `${name} ${value}`).join(', ');
    return empty(given ? `No gateway on this page with ${given}.` : 'No gateway has registered yet. ', !given && link('How to start one', ''));
  }
  const longest = Math.max(...gateways.map((gateway) => gateway.lease_left_ms ?? 0));
  const number = (title) => ({ title, number: true });
  const row = (gateway) => ({ key: `${gateway.gateway_addr} ${gateway.epoch}`, cells: [
    link(gateway.gateway_addr, 'gateways', gateway.gateway_addr), stateBadge(gateway.state), lease(gateway, longest), span(gateway.last_beat_ms_ago),
    count(gateway.routes), percent(gateway.load), gateway.region || '–',
    gateway.attached_node ? link(gateway.attached_node, 'nodes', gateway.attached_node) : 'none', act(gateway)] });
  return table('Gateways, the worst first',
    ['Gateway', 'State', 'Lease left', number('Last beat'), number('Routes'), number('Load'), 'Region', 'Stream at', mayAct() ? 'Actions' : ''],
    gateways.map(row), [plural(gateways.length, 'gateway'), '', '', '', count(gateways.reduce((sum, gateway) => sum + gateway.routes, 0)), '', '', '', '']);
}

/** What may be done to a gateway. */
export function act(gateway, done) {
  if (!mayAct() || gateway.state === 'over') return '';
  const { gateway_addr: addr, drain: running } = gateway;
  return h('span', { class: 'buttons' },
    h('button', { type: 'button', class: 'act', 'aria-label': `Drain ${addr}`, onclick: () => drain(addr, running, done) }, running ? 'Change drain …' : 'Drain …'),
    h('button', { type: 'button', class: 'act danger', 'aria-label': `Purge ${addr}`, onclick: () => purge(addr, done) }, 'Purge …'));
}

function pages(answer, cursors, turn) {
  if (!answer.next_cursor && cursors.length === 1) return undefined;
  return h('p', { key: 'pages', class: 'buttons' }, `Page ${cursors.length}, sorted within the page. `,
    h('button', { key: 'back', type: 'button', disabled: cursors.length === 1, onclick: () => turn(true) }, 'Back'),
    h('button', { key: 'next', type: 'button', disabled: !answer.next_cursor, onclick: () => turn(false) }, 'Next'));
}
