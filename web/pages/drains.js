// How far is the drain?

import { get } from '../api.js';
import { cancelDrain, drain } from '../actions.js';
import { badge, empty, h, link, section, table } from '../dom.js';
import { count, percent, plural, rate, span, when } from '../format.js';
import { mayAct } from '../live.js';

const RUNS = ['waiting', 'running'];
const HOW = { running: 'warn', waiting: 'warn', done: 'good' };

export function open({ reload }) {
  let drains;
  return {
    title: 'Drains',
    every: 2000,
    async load(signal) {
      drains = (await get(['drains'], { limit: 100 }, signal)).items;
    },
    show() {
      const running = drains.filter((each) => RUNS.includes(each.state));
      const over = drains.filter((each) => !RUNS.includes(each.state));
      return [
        section('Running', running.length ? running.map((each) => h('div', { key: each.id, class: 'card' }, h('h3', null, link(each.gateway_addr, 'gateways', each.gateway_addr)), progress(each, reload)))
          : empty('No drain runs. A gateway is drained from its row on the page ', link('Gateways', 'gateways'), ', or by ', h('code', null, 'im-presence ctl drain ADDR'), '.')),
        section('Of the last 30 days', over.length ? history(over) : empty('There were none.')),
      ];
    },
  };
}

/** A drain that runs: how far, how fast, how long still, and what may be done. */
export function progress(each, reload) {
  const share = each.users ? each.moved / each.users : 1;
  return h('div', { class: 'drain', key: `drain ${each.id ?? ''}` },
    h('p', null, badge(each.state, HOW[each.state] ?? 'idle'), ' ', h('strong', null, `${plural(each.left, 'user')} left`), ` of ${count(each.users)}`,
      `; ${count(each.asked)} asked so far`, each.unheard ? `, ${count(each.unheard)} did not hear it` : ''),
    h('progress', { max: 1, value: share, 'aria-label': `${percent(share)} moved` }),
    h('p', { class: 'soft' }, `${rate(each.rate)} a second; `, each.eta_s ? `about ${span(each.eta_s * 1000)} to go` : 'no estimate yet', '; began ', when(each.began_ms),
      each.deadline_ms ? [', the rest is removed at ', when(each.deadline_ms)] : ', no deadline', each.node_id ? `; carried out by ${each.node_id}` : '', each.who ? `; ordered by ${each.who}` : '',
      each.reason ? `; reason: ${each.reason}` : ''),
    mayAct() && RUNS.includes(each.state) && h('p', { class: 'buttons' },
      h('button', { type: 'button', class: 'act', 'aria-label': `Change the drain of ${each.gateway_addr}`, onclick: () => drain(each.gateway_addr, each, reload) }, 'Change …'),
      h('button', { type: 'button', class: 'act', 'aria-label': `Cancel the drain of ${each.gateway_addr}`, onclick: () => cancelDrain(each.gateway_addr, reload) }, 'Cancel …')));
}

function history(drains) {
  const number = (title) => ({ title, number: true });
  return table('Drains that are over', ['Gateway', 'State', number('Users'), number('Moved'), number('Left'), 'Began', 'Reason'],
    drains.map((each) => ({ key: each.id, cells: [link(each.gateway_addr, 'gateways', each.gateway_addr), badge(each.state, HOW[each.state] ?? 'idle'),
      count(each.users), count(each.moved), count(each.left), when(each.began_ms), each.reason || '–'] })));
}
