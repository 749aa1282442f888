// What operators may change, each behind its question.

import { send } from './api.js';
import { REASON, ask } from './dialog.js';
import { h, table } from './dom.js';
import { count, plural, rate, span } from './format.js';

const DRY = { dry_run: true };
const whole = (text) => (String(text).trim() === '' ? undefined : Number(text));
const plan = (moves) => moves?.length ? table('Where they would go', ['To', { title: 'Users', number: true }], moves.map((move) => ({ key: `${move.from}>${move.to}`, cells: [move.to, count(move.users)] }))) : undefined;

export function endHold(done) {
  ask({
    title: 'End the hold', verb: 'End the hold', danger: true, fields: [REASON], done,
    preview: async () => ({ says: await willDie(), ok: true }),
    run: async (values) => { await send('DELETE', ['hold'], { reason: values.reason }); return 'The hold is over: each gateway lives by its own lease again.'; },
  });
}

async function willDie() {
  const dry = await send('DELETE', ['hold'], { ...DRY, reason: 'dry run' });
  return `Gateways that stay silent are declared dead as their leases end: ${plural(dry.silent?.length ?? dry.lives ?? 0, 'gateway')}, ${plural(dry.will_die ?? 0, 'user')} at once.`;
}

export function confirmHold(done) {
  ask({
    title: 'Declare the silent gateways dead', verb: 'They are dead', danger: true, fields: [REASON], done,
    preview: async (values) => {
      const dry = await send('POST', ['hold', 'confirm'], DRY, { reason: values.reason || 'dry run' });
      return { says: `Ends ${plural(dry.lives ?? 0, 'life of a gateway', 'lives of gateways')}; ${plural(dry.users ?? dry.will_die ?? 0, 'user')} would go offline now.`, ok: true };
    },
    run: async (values) => { const did = await send('POST', ['hold', 'confirm'], {}, { reason: values.reason }); return `Ended ${plural(did.lives ?? 0, 'life', 'lives')}.`; },
  });
}

export function beginHold(done) {
  ask({
    title: 'Hold: declare no gateway dead', verb: 'Hold', done,
    fields: [{ name: 'minutes', label: 'For how many minutes', type: 'number', min: 1, max: 1440, value: 10, required: true }, REASON],
    preview: async (values) => {
      const dry = await send('PUT', ['hold'], DRY, { for_ms: values.minutes * 60_000, reason: values.reason || 'dry run' });
      return { says: `No gateway is declared dead for ${span(dry.left_ms ?? values.minutes * 60_000)}, whatever falls silent. Users of gateways that are really gone are shown online as long.`, ok: true };
    },
    run: async (values) => { await send('PUT', ['hold'], {}, { for_ms: values.minutes * 60_000, reason: values.reason }); return 'The hold is on.'; },
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
        says: `Moves ${plural(dry.drain.users, 'user')}${dry.drain.eta_s ? `, in about ${span(dry.drain.eta_s * 1000)}` : ''}. The gateway takes nobody new meanwhile.${dry.says ? ` ${dry.says}` : ''}`,
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
    title: `Cancel the drain of ${addr}`, verb: 'Cancel the drain', fields: [REASON], done,
    preview: async () => {
      const dry = await send('DELETE', ['gateways', addr, 'drain'], { ...DRY, reason: 'dry run' });
      return { says: `${plural(dry.drain?.left ?? 0, 'user')} would stay where they are; the gateway takes users again.`, ok: true };
    },
    run: async (values) => { await send('DELETE', ['gateways', addr, 'drain'], { reason: values.reason }); return 'Cancelled. Whoever has moved stays moved.'; },
  });
}

export function purge(addr, done) {
  ask({
    title: `Purge ${addr}`, verb: 'Purge', danger: true, typed: addr, fields: [REASON], done,
    preview: async () => {
      const dry = await send('DELETE', ['gateways', addr], { ...DRY, reason: 'dry run' });
      return { says: `Ends the life of this gateway now: ${plural(dry.routes ?? 0, 'route')} would go. Its clients have to connect again.`, ok: true };
    },
    run: async (values) => { const did = await send('DELETE', ['gateways', addr], { reason: values.reason }); return `Purged: ${plural(did.routes ?? 0, 'route')}.`; },
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
      const dry = await send('DELETE', ['users', user, 'devices', device], { ...DRY, reason: 'dry run' });
      return { says: `Removes ${plural(dry.removed ?? 0, 'route')}. The device may come back at once.`, ok: true };
    },
    run: async (values) => { await send('DELETE', ['users', user, 'devices', device], { reason: values.reason }); return 'Kicked.'; },
  });
}

export function forceOffline(user, done) {
  const body = (values) => ({ reason: values.reason || 'dry run', ban_for_s: values.ban ? values.ban * 60 : undefined });
  ask({
    title: `Take user ${user} offline`, verb: 'Take offline', danger: true, done,
    fields: [{ name: 'ban', label: 'And ban for so many minutes', type: 'number', min: 0, hint: 'Empty: no ban; devices may come back at once.' }, REASON],
    preview: async (values) => {
      const dry = await send('DELETE', ['users', user, 'routes'], { ...DRY }, body(values));
      return { says: `Removes ${plural(dry.removed ?? 0, 'device')}${values.ban ? `, and lets none back for ${span(values.ban * 60_000)}` : ''}.`, ok: true };
    },
    run: async (values) => { const did = await send('DELETE', ['users', user, 'routes'], {}, body(values)); return `Removed ${plural(did.removed ?? 0, 'device')}.`; },
  });
}

export function liftBan(user, done) {
  ask({
    title: `End the ban of user ${user}`, verb: 'End the ban', fields: [REASON], done,
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
      return { says: `${plural(dry.kicked ?? 0, 'device')} would be told to go${dry.reconnect_to?.length ? ` to ${dry.reconnect_to.join(', ')}` : ''}.`, ok: (dry.kicked ?? 0) > 0, more: plan(dry.plan) };
    },
    run: async (values) => { const did = await send('POST', ['users', user, 'migrate'], {}, body(values)); return `${plural(did.kicked ?? 0, 'device')} told to go.`; },
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
  const steps = answer.steps ?? answer.trace ?? [];
  return h('div', null, h('p', null, h('strong', null, answer.outcome ?? answer.code ?? 'Sent'), answer.says ? `: ${answer.says}` : ''),
    h('ol', { class: 'trace' }, steps.map((step) => h('li', null, h('span', { class: 'at' }, `${step.at_ms ?? step.ms ?? 0} ms`), ' ', step.what ?? step.says ?? step.step, step.node_id ? ` (${step.node_id})` : ''))));
}
