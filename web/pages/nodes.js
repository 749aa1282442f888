// The nodes, and what only each of them knows.

import { get } from '../api.js';
import { badge, empty, facts, h, link, notice, section, table } from '../dom.js';
import { count, span, when } from '../format.js';
import { nodeTable, state, up } from './overview.js';

const SOON_MS = 7 * 86_400_000;

export function open({ path: [id] }) {
  let nodes;
  let streams;
  let config;
  let diff;
  const kept = (promise) => promise.catch((problem) => { if (problem.name === 'AbortError' || problem.status === 401) throw problem; return { problem }; });
  return {
    title: id ? `Node ${id}` : 'Nodes',
    every: 3000,
    async load(signal) {
      const asked = [get(['nodes'], {}, signal)];
      if (id) asked.push(kept(get(['nodes', id, 'streams'], { sort: 'queue' }, signal)));
      // It does not change while a node runs.
      if (id && !config) asked.push(kept(get(['config'], { node: id }, signal)), kept(get(['config', 'diff'], {}, signal)));
      const answers = await Promise.all(asked);
      nodes = answers[0].items;
      streams = answers[1];
      if (answers[2] && !answers[2].problem) [, , config, diff] = answers;
      else if (answers[2]) [, , , diff] = answers;
    },
    show() {
      if (!id) return nodeTable(nodes);
      const node = nodes.find((each) => each.node_id === id);
      if (!node) return empty('No such node is known. It may have ended; see ', link('all nodes', 'nodes'), '.');
      return [about(node), !node.error && transport(node), streamTable(streams), differences(diff), configuration(config)];
    },
  };
}

function about(node) {
  return h('div', { key: 'about' }, h('p', null, state(node)), node.error && notice('bad', `It does not answer: ${node.error}. Last seen ${span(node.seen_ms_ago)} ago.`), facts([
    ['Address', node.addr], node.zone && ['Zone', node.zone], ['Version', node.version ?? '–'], ['Up since', when(node.up_since_ms)], ['Seen', `${span(node.seen_ms_ago)} ago`],
    ...(node.error ? [] : [['SQL', up(node.sql_ok)], ['Redis cache', up(node.redis_cache_ok)], ['Redis queue', up(node.redis_queue_ok)], ['Streams', count(node.streams)],
      ['Queued for streams', count(node.stream_queue_depth)], ['Waiting in lanes', count(node.lane_queue_depth)], ['Users in memory', count(node.l1_entries)], ['Connections', count(node.connections)]]),
  ]));
}

function transport(node) {
  const how = { on: 'good', unverified: 'warn', off: 'idle' };
  const pairs = Object.entries(node.tls ?? {}).map(([where, what]) => [where.replaceAll('_', ' '), badge(what ?? 'not configured', how[what] ?? 'idle')]);
  const certificates = (node.certificates ?? []).map((each) => {
    const left = each.not_after_ms - Date.now();
    return [each.use, h('span', null, when(each.not_after_ms), ' ', badge(left < 0 ? 'expired' : `${span(left)} left`, left < 0 ? 'bad' : left < SOON_MS ? 'warn' : 'good'))];
  });
  return section('TLS and certificates', pairs.length ? facts(pairs) : empty('Not told.'), certificates.length ? facts(certificates) : empty('No certificate is in use.'));
}

function streamTable(streams) {
  if (!streams) return undefined;
  if (streams.problem) return section('Streams', notice('warn', streams.problem.message));
  if (!streams.items.length) return section('Streams', empty('No gateway is attached to this node.'));
  const number = (title) => ({ title, number: true });
  return section('Streams', table('Streams, the worst first', ['Gateway', 'Since', number('Queue'), number('Delivered'), number('Shed'), number('Last frame'), 'Caller'],
    streams.items.map((each) => ({ key: `${each.gateway_addr} ${each.epoch}`, cells: [link(each.gateway_addr, 'gateways', each.gateway_addr), when(each.since_ms),
      each.queue_max ? `${count(each.queue)} of ${count(each.queue_max)}` : count(each.queue), count(each.delivered), count(each.shed), span(each.last_frame_ms_ago), each.caller || '–'] }))));
}

const text = (value) => (typeof value === 'object' ? JSON.stringify(value) : String(value));

function differences(diff) {
  if (!diff) return undefined;
  if (diff.problem) return section('Differences between nodes', notice('warn', diff.problem.message));
  const silent = diff.silent.length > 0 && notice('warn', `These did not say what is in force there: ${diff.silent.join(', ')}.`);
  if (!diff.items.length) return section('Differences between nodes', silent, empty('All nodes that answered are configured alike.'));
  const said = ({ node_id: id, value, source }) => h('li', null, `${id}: ${value === null ? 'not there' : text(value)}`, source && h('small', null, ` (${source})`));
  return section('Differences between nodes', silent, table('Keys that differ', ['Key', 'Values'],
    diff.items.map((item) => ({ key: item.key, cells: [item.key, h('ul', { class: 'plain' }, item.nodes.map(said))] }))));
}

function configuration(config) {
  if (!config) return section('Configuration in force', empty('Not known.'));
  const rows = Object.entries(config.sections ?? {}).flatMap(([name, keys]) => Object.entries(keys).map(([key, entry]) => ({
    key: `${name}.${key}`, class: entry.default ? 'soft' : 'set', cells: [`${name}.${key}`, text(entry.value), entry.source ?? (entry.default ? 'built-in' : '–')] })));
  const changed = rows.filter((row) => row.class === 'set');
  return section('Configuration in force', changed.length ? table('What was set', ['Key', 'Value', 'From'], changed) : empty('Everything has its default.'),
    h('details', null, h('summary', null, 'All keys'), table('All keys', ['Key', 'Value', 'From'], rows)));
}
