// Why is this user online, offline, or not reached?

import { get } from '../api.js';
import { forceOffline, kick, liftBan, migrate, testMessage } from '../actions.js';
import { badge, empty, facts, h, link, notice, section, table } from '../dom.js';
import { bytes, count, left, plural, span, when } from '../format.js';
import { mayAct } from '../live.js';
import { platform, shownBadge } from './users.js';

const DAYS = 28;
const DAY_MS = 86_400_000;
const VERDICT = { online: 'good', suspect: 'warn', offline: 'idle' };
const LIFE = { alive: 'good', live: 'good', late: 'warn', held: 'bad', over: 'bad', expired: 'bad' };
const TIER = { memory: 'Memory', shared: 'Redis', durable: 'SQL' };

export function open({ path: [id], reload }) {
  let user;
  let more = {};
  const again = () => { more = {}; reload(); };
  return {
    title: `User ${id}`,
    every: 5000,
    async load(signal) {
      const part = (name, params) => get(['users', id, name], params, signal).catch((problem) => {
        if (problem.name === 'AbortError' || problem.status === 401) throw problem;
        return { problem };
      });
      user = await get(['users', id], {}, signal);
      if (more.at > Date.now() - 30_000) return;
      const day = (ms) => new Date(ms).toISOString().slice(0, 10);
      const [history, online, inbox] = await Promise.all([part('history', { limit: 20, include_hidden: true }),
        part('online-time', { from_day: day(Date.now() - (DAYS - 1) * DAY_MS), to_day: day(Date.now()) }), part('inbox', { limit: 100 })]);
      more = { history, online, inbox, at: Date.now() };
    },
    show: () => [verdict(user), actions(id, user, again), wishes(user), devices(id, user, again), tiers(user), inbox(user, more.inbox), history(more.history), onlineTime(more.online)],
  };
}

function verdict(user) {
  const unsure = !user.tiers.some((tier) => tier.tier === 'durable' && tier.trusted);
  return [h('p', { key: 'verdict', class: 'because', role: 'status' }, badge(user.verdict, VERDICT[user.verdict] ?? 'idle'), ' ', user.because),
    unsure && notice('bad', 'The database cannot be asked: this is what memory and Redis say, and it cannot be confirmed.')];
}

function actions(id, user, again) {
  if (!mayAct()) return undefined;
  const button = (text, call, danger) => h('button', { type: 'button', class: danger ? 'act danger' : 'act', onclick: call }, text);
  return h('p', { key: 'actions', class: 'buttons' },
    button('Send a test message …', () => testMessage(id, again)),
    user.routes.length > 0 && button('Move …', () => migrate(id, again)),
    button('Take offline …', () => forceOffline(id, again), true),
    user.banned_until_ms && button('End the ban …', () => liftBan(id, again)));
}

function wishes(user) {
  return facts([['Shown as', shownBadge(user.shown)], ['Wants to be', user.wanted ?? '–'], user.status_text && ['Says', user.status_text],
    ['Last seen', when(user.last_seen_ms)],
    ['Ban', user.banned_until_ms ? h('span', null, badge('banned', 'bad'), ' until ', when(user.banned_until_ms)) : 'none'], ['Answered by', [link(user.node_id, 'nodes', user.node_id), user.silent_nodes.length > 0 && `; silent: ${user.silent_nodes.join(', ')}`]]]);
}

function devices(id, user, again) {
  const { routes } = user;
  if (!routes.length) return section('Devices', empty('No device is bound.'));
  const cells = ({ route, life, verdict: worth, why }) => [
    route.device_id || 'the unnamed one', [platform(route.platform), route.idle ? ', idle' : ''], link(route.gateway_addr, 'gateways', route.gateway_addr),
    [badge(worth, LIFE[worth] ?? 'idle'), life?.state === 'draining' ? ' draining' : '', why ? ` ${why}` : ''],
    left(life?.lease_left_ms), when(route.bound_at_ms), route.client_ip ?? '–',
    // A device without a name cannot be named in an order.
    mayAct() && route.device_id ? h('button', { type: 'button', class: 'act danger', 'aria-label': `Kick ${route.device_id}`, onclick: () => kick(id, route.device_id, again) }, 'Kick …') : ''];
  return section('Devices', table('Where each is, and what that is worth', ['Device', 'Platform', 'Gateway', 'Worth', 'Lease left', 'Bound', 'From', mayAct() ? 'Actions' : ''],
    routes.map((view) => ({ key: view.route.route_key, cells: cells(view) }))));
}

function tiers(user) {
  const newest = user.tiers.reduce((max, tier) => (BigInt(tier.version) > max ? BigInt(tier.version) : max), 0n);
  const card = (tier) => h('li', { class: 'card' },
    h('h3', null, TIER[tier.tier] ?? tier.tier, tier.tier === 'memory' && ` of ${tier.node_id}`),
    h('p', null, tier.present ? [`version ${tier.version} `, BigInt(tier.version) === newest ? badge('newest', 'good') : badge('behind', 'warn'), ` ${plural(tier.routes, 'device')}`] : 'nothing of this user'),
    tier.present && h('p', { class: 'soft' }, `${span(tier.age_ms)} old`, tier.generation ? `, generation ${tier.generation}` : ''),
    h('p', null, tier.trusted ? badge('believed', 'good') : badge('not believed', 'idle'), ' ', tier.why));
  return section('What each tier says', h('ul', { class: 'cards' }, user.tiers.map(card)));
}

/** What a part of the page shows that could not be asked for. */
function part(answer, show) {
  if (!answer) return empty('Loading …');
  if (answer.problem) return notice('warn', answer.problem.status === 404 ? 'Not known.' : answer.problem.message);
  return show(answer);
}

function inbox(user, answer) {
  const pending = user.inbox_messages;
  return section('Inbox', h('p', null, pending ? `${plural(pending, 'message waits', 'messages wait')}.` : 'Nothing waits.'), pending > 0 && part(answer, ({ items }) => table('Messages that wait, without their texts',
    [{ title: 'Number', number: true }, 'Message', 'Type', { title: 'Size', number: true }, 'Stored', 'Expires', 'For'],
    items.map((message) => ({ key: message.seq, cells: [message.seq, message.message_id || '–', message.message_type || '–', bytes(message.bytes), when(message.stored_ms),
      when(message.expires_ms), message.device_ids.join(', ') || 'all devices'] })))));
}

function history(answer) {
  return section('History', part(answer, ({ items }) => (items.length
    ? table('The last 20 changes', ['When', 'Shown as', 'Why', 'Gateway', { title: 'Devices', number: true }, { title: 'Version', number: true }],
      items.map((change) => ({ key: `${change.version} ${change.at_ms}`, cells: [when(change.at_ms), [shownBadge(change.shown), change.hidden ? ' hidden' : ''], change.cause,
        change.gateway_addr || '–', count(change.devices), change.version] })))
    : empty('Nothing is written down of this user.'))));
}

function onlineTime(answer) {
  return section('Time online', part(answer, (time) => {
    const { days } = time;
    if (!days.length) return empty(`Not online in the last ${DAYS} days.`);
    const bar = (day, i) => h('rect', { x: i * 10 + 1, y: 100 - Math.max(1, day.online_s / 864), width: 8, height: Math.max(1, day.online_s / 864), class: 'bar' },
      h('title', { svg: true }, `${day.day}: ${span(day.online_s * 1000)}, ${plural(day.sessions, 'session')}`));
    const all = `${span(time.online_s * 1000)} on ${plural(days.filter((day) => day.online_s > 0).length, 'day')}`;
    return [h('p', null, `${all} of the last ${DAYS}; activity ${time.activity_score} of 100.`),
      h('svg', { class: 'days', viewBox: `0 0 ${DAYS * 10} 100`, role: 'img', 'aria-label': `Time online a day: ${all}`, preserveAspectRatio: 'none' }, spread(days).map(bar))];
  }));
}

/** One entry a day, also for those without. */
function spread(days) {
  const known = new Map(days.map((day) => [day.day, day]));
  return Array.from({ length: DAYS }, (_, i) => {
    const day = new Date(Date.now() - (DAYS - 1 - i) * DAY_MS).toISOString().slice(0, 10);
    return known.get(day) ?? { day, online_s: 0, sessions: 0 };
  });
}
