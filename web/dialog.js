// Asks before something is changed: what it would do comes from a dry run, never from what the page shows.

import { fill, h, notice } from './dom.js';

/** Of somebody who types, before the dry run is asked for. */
const PAUSE_MS = 250;

export const REASON = { name: 'reason', label: 'Reason', required: true, maxlength: 200, hint: 'Whoever looks later sees it, in the audit too.' };

/** What is wrong with a number; nothing, if it may be so. */
function outside({ label, type, min, max }, value) {
  if (type !== 'number' || String(value).trim() === '') return undefined;
  const number = Number(value);
  if (min !== undefined && number < min) return `${label}: at least ${min}.`;
  return max !== undefined && number > max ? `${label}: at most ${max}.` : undefined;
}

/**
 * @param {object} what
 *   title, verb: the words on the dialog and on its button
 *   danger: it cannot be taken back
 *   fields: [{ name, label, type, value, required, min, max, options, hint }]
 *   typed: what has to be typed to show that it is meant
 *   away: the word on the button that does nothing, where Cancel could be taken for the order
 *   preview: async (values) => ({ says, ok, more }): the dry run. None: it changes nothing that a number could tell.
 *   run: async (values) => what came of it, a text or a node
 */
export function ask(what) {
  const dialog = h('dialog', { 'aria-labelledby': 'dialog-title', class: what.danger && 'danger' });
  const state = { values: {}, preview: undefined, problem: undefined, busy: false, done: undefined };
  const opener = document.activeElement;
  let latest = 0;
  let soon;
  for (const field of what.fields ?? []) state.values[field.name] = field.value ?? '';

  const beyond = () => (what.fields ?? []).map((field) => outside(field, state.values[field.name])).find(Boolean);
  const complete = () => !beyond() && (what.fields ?? []).every((field) => !field.required || String(state.values[field.name]).trim() !== '')
    && (!what.typed || state.values.typed === what.typed);
  const ready = () => complete() && !state.busy && (!what.preview || state.preview?.ok !== false && state.preview);

  async function look() {
    if (!what.preview) return;
    const mine = ++latest;
    state.preview = state.problem = undefined;
    draw();
    try {
      const preview = await what.preview(state.values);
      if (mine === latest) state.preview = preview;
    } catch (problem) {
      if (mine === latest) state.problem = problem;
    }
    draw();
  }

  /** While somebody types; not when the field is left, which may be by a click on the order, and that would be lost. */
  function lookSoon() {
    clearTimeout(soon);
    latest += 1;
    state.preview = state.problem = undefined;
    soon = setTimeout(() => beyond() || look(), PAUSE_MS);
  }

  async function run(event) {
    event.preventDefault();
    if (!ready()) return;
    state.busy = true;
    state.problem = undefined;
    draw();
    try {
      state.done = (await what.run(state.values)) ?? 'Done.';
    } catch (problem) {
      state.problem = problem;
    }
    state.busy = false;
    draw();
    if (state.done) dialog.querySelector('.close')?.focus();
  }

  const input = (field) => {
    const id = `field-${field.name}`;
    const props = {
      id, name: field.name, required: field.required, min: field.min, max: field.max, maxlength: field.maxlength, autocomplete: 'off',
      'aria-describedby': field.hint && `${id}-hint`,
      oninput: (event) => {
        state.values[field.name] = event.target.value;
        if (field.looks !== false && field.name !== 'reason') lookSoon();
        draw();
      },
    };
    const value = field.value ?? '';
    const control = field.options
      ? h('select', props, field.options.map(([v, text]) => h('option', { value: v, selected: v === value }, text)))
      : h(field.type === 'textarea' ? 'textarea' : 'input', { ...props, type: field.type ?? 'text', value });
    return h('p', { key: field.name, class: 'field' }, h('label', { for: id }, field.label), control,
      field.hint && h('small', { id: `${id}-hint` }, field.hint));
  };

  function draw() {
    const says = beyond() ? undefined : state.preview ? [notice(state.preview.ok === false ? 'bad' : 'warn', state.preview.says), state.preview.more] : 'Asking what it would do …';
    const typed = what.typed && input({ name: 'typed', label: `Type ${what.typed} to confirm`, required: true, looks: false });
    fill(dialog, h('form', { onsubmit: run, novalidate: true },
      h('h2', { id: 'dialog-title' }, what.title),
      state.done ? h('div', { key: 'done', role: 'status' }, typeof state.done === 'string' ? notice('good', state.done) : state.done) : [
        (what.fields ?? []).map(input),
        what.preview && h('div', { key: 'preview', role: 'status', class: 'preview' }, state.problem ? undefined : says),
        typed,
      ],
      h('div', { key: 'problem', role: 'alert' }, beyond() ? notice('bad', beyond()) : state.problem && notice('bad', state.problem.field ? `${state.problem.field}: ` : '', state.problem.message)),
      h('p', { key: 'buttons', class: 'buttons' },
        h('button', { key: 'close', type: 'button', class: 'close', onclick: () => dialog.close() }, state.done ? 'Close' : what.away ?? 'Cancel'),
        state.problem && what.preview && !state.preview && h('button', { key: 'look', type: 'button', onclick: look }, 'Ask again'),
        !state.done && h('button', { key: 'run', type: 'submit', class: what.danger ? 'primary danger' : 'primary', disabled: !ready() },
          state.busy ? 'Working …' : what.verb))));
  }

  dialog.addEventListener('close', () => {
    clearTimeout(soon);
    dialog.remove();
    if (opener?.isConnected) opener.focus();
    if (state.done) what.done?.();
  });
  draw();
  document.body.append(dialog);
  dialog.showModal();
  (dialog.querySelector('input, select, textarea') ?? dialog.querySelector('.close')).focus();
  look();
}
