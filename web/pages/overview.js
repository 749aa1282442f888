// Is it us, or something around us?

import { get } from '../api.js';
import { chart } from '../chart.js';
import { badge, empty, h, link, section, table, to } from '../dom.js';
import { count, percent, plural, rate, span } from '../format.js';
import { live } from '../live.js';
import { eventRow } from './events.js';

export function open() {
  let nodes;
  let grafana;
  return {
    title: 'Overview',
    every: 5000,
    live: true,
    async load(signal) {
      grafana ??= get(['config'], {}, signal).then((config) => config.sections?.console?.grafana_url?.value, () => undefined);
      const [listed, url] = await Promise.all([get(['nodes'], {}, signal), grafana]);
      nodes = listed.items;
      grafana = url ?? '';
    },
    show: () => (live.summary ? [because(live.summary), numbers(live.summary), first(live.summary), charts(grafana), nodeTable(nodes), lastEvents()] : []),
  };
}

function because(summary) {
  const reasons = summary.because ?? [];
  if (!reasons.length) return h('p', { key: 'because', class: 'notice good' }, 'Nothing is wrong that the nodes know of.');
  return h('ul', { key: 'because', class: 'notice warn' }, reasons.map((reason) => h('li', null, reason)));
}

const short = (ms) => (ms === undefined || ms === null ? '–' : `${rate(ms)} ms`);

function numbers(s) {
  const rates = s.rates ?? {};
  const list = [
    ['Users online', count(s.users_online), s.devices !== undefined && plural(s.devices, 'device')],
    ['Suspect users', count(s.suspect_users), 'on gateways that are late or held'],
    ['Binds', rate(rates.binds), `a second, p99 ${short(s.latency_ms?.bind_p99)}`],
    ['Queries', rate(rates.queries), `a second, p99 ${short(s.latency_ms?.query_p99)}`],
    ['Deliveries', rate(rates.deliveries), `a second, p99 ${short(s.latency_ms?.delivery_p99)}`],
    ['Delivered', percent(rates.delivered_share), `${rate(rates.errors)} errors a second`],
  ];
  return h('dl', { key: 'numbers', class: 'numbers' }, list.map(([name, value, more]) =>
    h('div', null, h('dt', null, name), h('dd', null, h('strong', null, value), more && h('small', null, more)))));
}

function first(s) {
  const states = Object.entries(s.gateways ?? {});
  const known = states.reduce((sum, [, n]) => sum + n, 0);
  if (known === 0) {
    return section('No gateway yet', empty('Three commands show the rest working, in a terminal beside this page:'),
      h('pre', { tabindex: '0' }, 'im-presence ctl gateway gw-1:7000 42 43 &\nim-presence ctl query 42\nim-presence ctl deliver 42 \'dinner is ready\''));
  }
  const shown = states.filter(([, n]) => n > 0).map(([state, n]) => h('a', { class: 'tile', href: `#/gateways?state=${state}` }, h('strong', null, count(n)), ` ${state}`));
  const others = [
    [s.deaths_last_hour, 'died in the last hour', '#/events'], [s.drains, s.drains === 1 ? 'drain runs' : 'drains run', '#/drains'],
    [s.inbox?.messages, s.inbox?.oldest_s ? `messages wait in inboxes, the oldest for ${span(s.inbox.oldest_s * 1000)}` : 'messages wait in inboxes'],
    [s.outbox_rows, 'changes not shown outside yet'], [s.sweep_backlog, 'routes to be swept'],
  ].filter(([n]) => n > 0).map(([n, text, href]) => h(href ? 'a' : 'span', { class: 'tile', href }, h('strong', null, count(n)), ` ${text}`));
  return section('Gateways and what waits', h('p', { class: 'tiles' }, shown, others));
}

function charts(grafana) {
  const samples = () => live.samples;
  const note = ['The last 15 minutes, as far as this tab was open: nothing is stored on the server. ',
    typeof grafana === 'string' && /^https?:/.test(grafana) ? h('a', { href: grafana, rel: 'noreferrer' }, 'More in Grafana') : 'For more, set console.grafana_url.'];
  return section('Charts', h('p', { class: 'soft' }, note), h('div', { class: 'charts' },
    chart('Users online', [{ label: 'online', of: (s) => s.users_online }, { label: 'suspect', of: (s) => s.suspect_users }], samples),
    chart('Queries a second', [{ label: 'queries', of: (s) => s.rates?.queries }], samples),
    chart('Binds and deliveries a second', [{ label: 'binds', of: (s) => s.rates?.binds }, { label: 'deliveries', of: (s) => s.rates?.deliveries }], samples),
    chart('Slowest of a hundred', [{ label: 'query', of: (s) => s.latency_ms?.query_p99 }, { label: 'bind', of: (s) => s.latency_ms?.bind_p99 },
      { label: 'delivery', of: (s) => s.latency_ms?.delivery_p99 }], samples, ' ms')));
}

/** Whether a part answers; what is not configured is not red. */
export const up = (ok) => (ok === undefined || ok === null ? badge('not configured', 'idle') : ok ? badge('up', 'good') : badge('away', 'bad'));

export function state(node) {
  if (node.error) return badge(node.error, 'bad');
  if (!node.ready) return badge('not ready', 'bad');
  return node.degraded?.length ? badge(node.degraded.join(', '), 'warn') : badge('ready', 'good');
}

export function nodeTable(nodes) {
  if (!nodes) return section('Nodes', empty('Loading …'));
  const number = (title) => ({ title, number: true });
  return section('Nodes', table('What each says of itself', ['Node', 'State', 'SQL', 'Redis cache', 'Redis queue', number('Streams'), number('Queued'), number('Users in memory'), 'Version'],
    nodes.map((node) => ({ key: node.node_id, cells: [
      h('a', { href: to('nodes', node.node_id) }, node.node_id), state(node), ...(node.error ? ['–', '–', '–'] : [up(node.sql_ok), up(node.redis_cache_ok), up(node.redis_queue_ok)]),
      count(node.streams), count(node.stream_queue_depth), count(node.l1_entries), node.version] }))));
}

function lastEvents() {
  const last = live.events.slice(0, 10);
  return section('Last events', last.length ? h('ul', { class: 'events' }, last.map(eventRow)) : empty('Nothing has happened lately.'),
    h('p', null, link('All events, and who did what', 'events')));
}
