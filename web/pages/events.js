// What happens, live; and who did what.

import { get } from '../api.js';
import { badge, empty, h, notice, section, table } from '../dom.js';
import { clock, when } from '../format.js';
import { live } from '../live.js';

const KINDS = ['death', 'hold', 'drain', 'degraded', 'node', 'audit'];
const HOW = { death: 'bad', hold: 'warn', degraded: 'warn', drain: 'idle', node: 'idle', audit: 'idle', gap: 'bad' };
const SHOWN = 200;

/** An event in words. */
export function words({ kind, data }) {
  if (kind === 'gap') return `Events between ${data.from_ms ? clock(data.from_ms) : 'the start'} and ${clock(data.to_ms)} were missed; the audit below has all that was ordered.`;
  if (data.says) return data.says;
  return Object.entries(data).filter(([name, value]) => name !== 'at_ms' && value !== '' && value !== null)
    .map(([name, value]) => `${name}: ${typeof value === 'object' ? JSON.stringify(value) : value}`).join(', ');
}

export const eventRow = (event) => h('li', { key: `${event.id} ${event.kind}` }, event.data.at_ms ? when(event.data.at_ms) : '', ' ',
  badge(event.kind, HOW[event.kind] ?? 'idle'), ' ', words(event));

export function open({ query, redraw, reload, search }) {
  let audit;
  const cursors = [undefined];
  const { kind = '', text = '' } = query;
  const fits = (event) => event.kind === 'gap' || ((!kind || event.kind === kind) && words(event).toLowerCase().includes(text.toLowerCase()));
  const turn = (back) => { if (back) cursors.pop(); else cursors.push(audit.next_cursor); reload(); redraw(); };
  return {
    title: 'Events',
    every: 5000,
    live: true,
    async load(signal) {
      audit = await get(['audit'], { who: query.who, action: query.action, limit: 50, cursor: cursors.at(-1) }, signal);
    },
    show() {
      const events = live.events.filter(fits).slice(0, SHOWN);
      return [
        section('Live', filters([['kind', 'Kind', ['', ...KINDS]], ['text', 'Text in it']], query, search),
          events.length ? h('div', { role: 'log', class: 'log', tabindex: '0', 'aria-label': 'Events, the newest first' }, h('ul', { class: 'events' }, events.map(eventRow)))
            : empty(kind || text ? 'Nothing of that has happened lately.' : 'Nothing has happened lately.')),
        section('Who did what', filters([['who', 'Who, exactly'], ['action', 'Action, exactly']], query, search), auditTable(audit, query), pages(audit, cursors, turn)),
      ];
    },
  };
}

function filters(fields, query, search) {
  const change = (name) => (event) => search({ ...query, [name]: event.target.value.trim() });
  return h('form', { class: 'filters', onsubmit: (event) => event.preventDefault() }, fields.map(([name, label, options]) => {
    const id = `filter-${name}`;
    const value = query[name] ?? '';
    return h('p', { class: 'field' }, h('label', { for: id }, label), options
      ? h('select', { id, onchange: change(name) }, options.map((option) => h('option', { value: option, selected: option === value }, option || 'any')))
      : h('input', { id, value, onchange: change(name) }));
  }));
}

function auditTable(audit, query) {
  if (!audit.items.length) return empty(query.who || query.action ? 'Nothing in the audit fits: a name has to be whole, as in DrainGateway.' : 'No operator has changed anything yet.');
  return table('Audit, the newest first', ['When', 'Who', 'From', 'Action', 'Target', 'How', 'Outcome', 'Reason'],
    audit.items.map((entry) => ({ key: `${entry.at_ms} ${entry.node_id} ${entry.seq}`, cells: [when(entry.at_ms), `${entry.who || (entry.from_addr ? 'nobody signed in' : entry.node_id)}${entry.role ? `, ${entry.role}` : ''}`, entry.from_addr || '–',
      entry.action, entry.target || '–', entry.args || '–', badge(entry.outcome, entry.outcome === 'ok' ? 'good' : 'bad'), entry.reason || '–'] })));
}

function pages(audit, cursors, turn) {
  if (!audit.next_cursor && cursors.length === 1) return undefined;
  return [cursors.length > 1 && notice('idle', `Page ${cursors.length}: not the newest.`), h('p', { key: 'pages', class: 'buttons' },
    h('button', { key: 'back', type: 'button', disabled: cursors.length === 1, onclick: () => turn(true) }, 'Newer'),
    h('button', { key: 'next', type: 'button', disabled: !audit.next_cursor, onclick: () => turn(false) }, 'Older'))];
}
