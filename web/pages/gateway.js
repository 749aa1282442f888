// One gateway: its life, its former lives, who is on it.

import { get } from '../api.js';
import { chart } from '../chart.js';
import { empty, facts, h, link, section, table } from '../dom.js';
import { count, percent, span, when } from '../format.js';
import { act, lease, stateBadge } from './gateways.js';
import { progress } from './drains.js';
import { userTable } from './users.js';

const SAMPLES = 450;

export function open({ path: [addr], reload }) {
  let gateway;
  let users;
  const samples = [];
  return {
    title: 'Gateway',
    heading: () => addr,
    every: 2000,
    async load(signal) {
      const [found, listed] = await Promise.all([
        get(['gateways', addr], {}, signal),
        get(['users'], { gateway: addr, limit: 100 }, signal),
      ]);
      gateway = { ...found.gateway, lives: found.lives, digest: found.digest };
      users = listed;
      samples.push({ at: Date.now() / 1000, connections: gateway.connections, routes: gateway.routes });
      samples.splice(0, samples.length - SAMPLES);
    },
    show: () => [life(gateway, reload), gateway.drain && section('Drain', progress({ gateway_addr: addr, ...gateway.drain }, reload)),
      lives(gateway), samples.length > 0 && section('Connections', h('p', { class: 'soft' }, 'Since this page was opened.'),
        h('div', { class: 'charts' }, chart('Connections and routes', [{ label: 'connections', of: (s) => s.connections }, { label: 'routes', of: (s) => s.routes }], () => samples))),
      section('Users on it', users.items.length ? userTable(users.items, 'The first 100 users on it') : empty('Nobody is on it.'))],
  };
}

function life(gateway, reload) {
  if (gateway.state === 'over') return empty('No life of this gateway goes on. Its former lives are below.');
  const labels = Object.entries(gateway.labels ?? {});
  return h('div', { key: 'life' }, h('p', { class: 'buttons' }, stateBadge(gateway.state), act(gateway, reload)), facts([
    ['Epoch', gateway.epoch], ['Lease left', lease(gateway, gateway.lease_left_ms)], ['Last beat', gateway.last_beat_ms_ago === null ? 'it sends none' : `${span(gateway.last_beat_ms_ago)} ago`],
    ['Region', gateway.region || '–'], ['Routes', count(gateway.routes)],
    ['Connections', gateway.capacity ? `${count(gateway.connections)} of ${count(gateway.capacity)}` : count(gateway.connections)],
    ['Load', percent(gateway.load)], ['Weight', count(gateway.weight)], gateway.public_addr !== gateway.gateway_addr && ['Clients reach it at', gateway.public_addr],
    ['Stream at', gateway.attached_node ? link(gateway.attached_node, 'nodes', gateway.attached_node) : 'none: it is not attached'],
    ['Digest', gateway.digest || 'not known here'],
    labels.length && ['Labels', h('ul', { class: 'plain' }, labels.map(([name, value]) => h('li', null, `${name} = ${value}`)))],
  ]));
}

function lives(gateway) {
  const list = gateway.lives ?? [];
  if (!list.length) return section('Lives', empty('No life of this address is known.'));
  return section('Lives', table('The last lives, the newest first', ['Epoch', 'Began', 'Ended', 'Why'],
    list.map((life) => ({ key: life.epoch, cells: [life.epoch, when(life.began_ms), life.ended_ms ? when(life.ended_ms) : 'goes on', life.end_reason || '–'] }))));
}
