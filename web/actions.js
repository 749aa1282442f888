// What operators may change, each behind its question.

import { get, send } from './api.js';
import { REASON, ask } from './dialog.js';
import { h, notice, table } from './dom.js';
import { count, plural, rate, span, when } from './format.js';

const DRY = { dry_run: true };
const whole = (text) => (String(text).trim() === '' ? undefined : Number(text));
const plan = (moves) => moves?.length ? table('Where they would go', ['To', { title: 'Users', number: true }], moves.map((move) => ({ key: `${move.from}>${move.to}`, cells: [move.to, count(move.users)] }))) : undefined;

export function endHold(done) {
  ask({
    title: 'End the hold', verb: 'End the hold', danger: true, fields: [REASON], done,
    preview: async () => {
      const { silent_gateways: silent, will_die: routes } = await get(['hold']);
      return { says: silent ? `${plural(silent, 'gateway is', 'gateways are')} silent, with ${plural(routes, 'device')}: those whose leases are over are declared dead at once, the others when theirs are.` : 'No gateway is silent now: nobody would go offline.', ok: true };
    },
    run: async (values) => { await send('DELETE', ['hold'], { reason: values.reason }); return 'The hold is over: each gateway lives by its own lease again.'; },
  });
}

export function confirmHold(done) {
  ask({
    title: 'Declare the silent gateways dead', verb: 'They are dead', danger: true, fields: [REASON], done,
    preview: async () => {
      const dry = await send('POST', ['hold', 'confirm'], DRY, { reason: 'dry run' });
      return { says: `Ends ${plural(dry.lives, 'life of a gateway', 'lives of gateways')}; ${plural(dry.routes, 'device')} would go offline now.`, ok: dry.lives > 0 };
    },
    run: async (values) => { const did = await send('POST', ['hold', 'confirm'], {}, { reason: values.reason }); return `Ended ${plural(did.lives, 'life', 'lives')} with ${plural(did.routes, 'device')}. The hold is over.`; },
  });
}

/** `isOn`: it is prolonged. */
export function beginHold(done, isOn) {
  ask({
    title: isOn ? 'Prolong the hold' : 'Hold: declare no gateway dead', verb: isOn ? 'Prolong it' : 'Hold', done,
    fields: [{ name: 'minutes', label: 'For how many minutes', type: 'number', min: 1, max: 1440, value: 10, required: true }, REASON],
    preview: async (values) => {
      const { silent_gateways: silent } = await get(['hold']);
      return { says: `No gateway is declared dead for ${span(values.minutes * 60_000)} from now, whatever falls silent; ${plural(silent, 'is', 'are')} silent now. Users of gateways that are really gone are shown online as long.`, ok: true };
    },
    run: async (values) => { await send('PUT', ['hold'], {}, { for_ms: Math.round(values.minutes * 60_000), reason: values.reason }); return 'The hold is on.'; },
  });
}

const drainBody = (values) => ({ rate: whole(values.rate), deadline_s: whole(values.deadline), force: values.force === 'yes' || undefined, reason: values.reason || 'dry run' });

export function drain(addr, now, done) {
  ask({
    title: now ? `Change the drain of ${addr}` : `Drain ${addr}`, verb: now ? 'Change it' : 'Drain', done,
    fields: [
      { name: 'rate', label: 'Users per second', type: 'number', min: 1, value: now?.rate ?? '', hint: 'Empty: as configured (drain.rate).' },
      { name: 'deadline', label: 'Deadline, in seconds', type: 'number', min: 0, value: '', hint: 'Then whoever is left is removed. Empty: none.' },
      { name: 'force', label: 'If the others lack room', options: [['no', 'do not begin'], ['yes', 'begin all the same']], value: 'no' },
      REASON,
    ],
    preview: async (values) => {
      const dry = await send('POST', ['gateways', addr, 'drain'], DRY, drainBody(values));
      return {
        says: `Moves ${plural(dry.drain.users, 'user')}${dry.drain.eta_s ? `, in about ${span(dry.drain.eta_s * 1000)}` : ''}. The gateway takes nobody new meanwhile.${dry.note ? ` But: ${dry.note}` : ''}`,
        ok: true, more: plan(dry.plan),
      };
    },
    run: async (values) => {
      const did = await send('POST', ['gateways', addr, 'drain'], {}, drainBody(values));
      return `Draining ${plural(did.drain.left, 'user')} at ${rate(did.drain.rate)} a second.`;
    },
  });
}

export function cancelDrain(addr, done) {
  ask({
    title: `Cancel the drain of ${addr}`, verb: 'Cancel the drain', away: 'Let it run', done,
    preview: async () => {
      const { gateway } = await get(['gateways', addr]);
      const { left = 0, asked = 0, moved = 0 } = gateway.drain ?? {};
      const underWay = Math.min(left, Math.max(0, asked - moved));
      return { says: `Nobody else is asked to go, and the gateway takes users again. ${plural(left, 'user')} left; ${count(underWay)} of them were asked before and may still go.`, ok: true };
    },
    run: async () => { await send('DELETE', ['gateways', addr, 'drain']); return 'Cancelled. Whoever has moved stays moved.'; },
  });
}

export function purge(addr, done) {
  ask({
    title: `Purge ${addr}`, verb: 'Purge', danger: true, typed: addr, fields: [REASON], done,
    preview: async () => {
      const dry = await send('DELETE', ['gateways', addr], { ...DRY, reason: 'dry run' });
      return { says: `Ends the life of this gateway now: ${plural(dry.routes, 'device')} would go offline. Its clients have to connect again.`, ok: true };
    },
    run: async (values) => { const did = await send('DELETE', ['gateways', addr], { reason: values.reason }); return `Purged: ${plural(did.routes, 'device')} went offline.`; },
  });
}

export function rebalance(done) {
  const body = (values) => ({ tolerance: whole(values.tolerance) === undefined ? undefined : values.tolerance / 100, region: values.region || undefined, reason: values.reason || 'dry run' });
  ask({
    title: 'Level the loads', verb: 'Move them', done,
    fields: [
      { name: 'tolerance', label: 'How far from the mean loads may stay, in %', type: 'number', min: 1, max: 100, value: 10 },
      { name: 'region', label: 'Only this region', hint: 'Empty: each by itself.' }, REASON,
    ],
    preview: async (values) => {
      const dry = await send('POST', ['gateways', 'rebalance'], DRY, body(values));
      const users = dry.plan.reduce((sum, move) => sum + move.users, 0);
      const rows = dry.plan.map((move) => ({ key: `${move.from}>${move.to}`, cells: [move.from, move.to, count(move.users)] }));
      return { says: users ? `Moves ${plural(users, 'user')}.` : 'All are level already: nobody would move.', ok: users > 0, more: users ? table('Who would move', ['From', 'To', { title: 'Users', number: true }], rows) : undefined };
    },
    run: async (values) => { const did = await send('POST', ['gateways', 'rebalance'], {}, body(values)); return `${plural(did.drains?.length ?? 0, 'drain')} began.`; },
  });
}

// === users ===

export function kick(user, device, done) {
  ask({
    title: `Kick ${device} of user ${user}`, verb: 'Kick', danger: true, fields: [REASON], done,
    preview: async () => {
      const dry = await send('DELETE', ['users', user, 'devices'], { ...DRY, device_id: device, reason: 'dry run' });
      return { says: `Takes off ${plural(dry.kicked.length, 'device')}. It may come back at once.`, ok: true };
    },
    run: async (values) => { await send('DELETE', ['users', user, 'devices'], { device_id: device, reason: values.reason }); return 'Kicked.'; },
  });
}

export function forceOffline(user, done) {
  const query = (values) => ({ reason: values.reason || 'dry run', ban_for_s: values.ban ? Math.round(values.ban * 60) : undefined });
  ask({
    title: `Take user ${user} offline`, verb: 'Take offline', danger: true, done,
    fields: [{ name: 'ban', label: 'And ban for so many minutes', type: 'number', min: 0, hint: 'Empty: no ban; devices may come back at once.' }, REASON],
    preview: async (values) => {
      const dry = await send('DELETE', ['users', user, 'routes'], { ...DRY, ...query(values) });
      return { says: `Takes off ${plural(dry.kicked.length, 'device')}${values.ban ? `, and lets none back for ${span(values.ban * 60_000)}` : ''}.`, ok: true };
    },
    run: async (values) => { const did = await send('DELETE', ['users', user, 'routes'], query(values)); return [notice('good', `Took off ${plural(did.kicked.length, 'device')}.`), did.banned_until_ms ? notice('good', 'Banned until ', when(did.banned_until_ms), '.') : '']; },
  });
}

export function liftBan(user, done) {
  ask({
    title: `End the ban of user ${user}`, verb: 'End the ban', fields: [REASON], done,
    preview: async () => { await send('DELETE', ['users', user, 'ban'], { ...DRY, reason: 'dry run' }); return { says: 'Devices of this user may connect again.', ok: true }; },
    run: async (values) => { await send('DELETE', ['users', user, 'ban'], { reason: values.reason }); return 'The user may connect again.'; },
  });
}

export function migrate(user, done) {
  const body = (values) => ({ to: values.to || undefined, reason: values.reason || 'dry run' });
  ask({
    title: `Move user ${user} to another gateway`, verb: 'Move', done,
    fields: [{ name: 'to', label: 'To this gateway', hint: 'Empty: by allocation.' }, REASON],
    preview: async (values) => {
      const dry = await send('POST', ['users', user, 'migrate'], DRY, body(values));
      return { says: `${plural(dry.routes, 'device')} would be told to go.`, ok: dry.routes > 0, more: plan(dry.plan) };
    },
    run: async (values) => { const did = await send('POST', ['users', user, 'migrate'], {}, body(values)); return `${plural(did.routes, 'device')} told to go.`; },
  });
}

export function testMessage(user, done) {
  ask({
    title: `Send user ${user} a test message`, verb: 'Send', done,
    fields: [
      { name: 'message', label: 'Text', value: 'This is a test.', required: true, maxlength: 1000 },
      { name: 'type', label: 'Message type', value: 'test', required: true, maxlength: 64, hint: 'As your clients understand it.' },
      { name: 'ack', label: 'Wait for the device, in ms', type: 'number', min: 0, max: 9000, value: 2000 },
    ],
    run: async (values) => trace(await send('POST', ['users', user, 'deliver'], {}, { message: values.message, message_type: values.type, ack_timeout_ms: Number(values.ack) })),
  });
}

function trace(answer) {
  const { delivered, stored, code, msg, receivers, attempts, acked_devices: acked, steps = [] } = answer;
  const word = acked.length ? `A device has it: ${acked.join(', ')}` : delivered ? 'A gateway took it' : stored ? 'It is stored' : `Not delivered (${code})`;
  return h('div', null, notice(delivered ? 'good' : 'warn', word, msg ? `: ${msg}.` : '.'), h('p', { class: 'soft' }, `${plural(receivers, 'receiver')}, ${plural(attempts, 'attempt')}.`),
    steps.length > 0 && h('ol', { class: 'trace' }, steps.map(step)));
}

/** One step of a delivery, with when it began. */
function step({ at_us: at, took_us: took, what, detail, node_id: node, gateway_addr: gateway, device_id: device }) {
  const where = [gateway, device, node].filter(Boolean).join(', ');
  return h('li', null, h('span', { class: 'at' }, `${rate(at / 1000)} ms`), ` ${what.replaceAll('_', ' ')}`, where && ` (${where})`, took > 0 && `, took ${rate(took / 1000)} ms`, detail && `: ${detail}`);
}
