// Builds what is shown and refreshes it in place. Text goes in as text nodes: nothing that came over the wire is ever parsed.

const SVG = new Set(['svg', 'rect', 'title', 'g']);
const HANDLERS = ['onclick', 'onsubmit', 'oninput', 'onchange', 'onkeydown'];
// What the user has changed since stays as it is.
const LEFT_ALONE = { INPUT: ['value', 'checked'], SELECT: ['value'], OPTION: ['selected'], DETAILS: ['open'] };

/** An element. `key` tells it from its neighbours in a list; `keep` is called once with it, and looks after its content from then on. */
export function h(tag, props, ...children) {
  const inSvg = SVG.has(tag) && (tag !== 'title' || props?.svg);
  const element = inSvg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false || name === 'svg') continue;
    if (name === 'key' || name === 'keep' || HANDLERS.includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  if (props?.keep) element.dataset.keep = '';
  element.append(...flat(children));
  return element;
}

function flat(children) {
  return children.flat(9).filter((child) => child !== undefined && child !== null && child !== false && child !== '');
}

/** Makes the content of `parent` what is given. What is there and fits stays: with its focus, its selection, its place. */
export function fill(parent, ...children) {
  const focused = document.activeElement;
  const wanted = flat(children).map((child) => (child instanceof Node ? child : document.createTextNode(child)));
  fit(parent, wanted);
  for (const element of parent.querySelectorAll('[data-keep]')) {
    if (!element.kept) element.keep(element);
    element.kept = true;
  }
  if (!focused || focused === document.activeElement || focused === document.body) return;
  if (focused.isConnected) focused.focus({ preventScroll: true });
  else document.querySelector('main')?.focus({ preventScroll: true });
}

function fit(parent, wanted) {
  const keys = new Set(wanted.map((node) => node.key));
  const known = new Map();
  for (const node of [...parent.childNodes]) {
    if (node.key === undefined) continue;
    if (keys.has(node.key)) known.set(node.key, node);
    else node.remove();
  }
  let at = parent.firstChild;
  for (const next of wanted) {
    const found = next.key === undefined ? unkeyed(at) : known.get(next.key);
    if (!found || found.nodeName !== next.nodeName) {
      parent.insertBefore(next, at);
      continue;
    }
    if (found === at) at = at.nextSibling;
    else if (parent.moveBefore) parent.moveBefore(found, at);
    else parent.insertBefore(found, at);
    match(found, next);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

const unkeyed = (node) => (node && node.key === undefined ? node : undefined);

function match(old, next) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  const alone = LEFT_ALONE[old.nodeName] ?? [];
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !alone.includes(name)) old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value && !alone.includes(name)) old.setAttribute(name, value);
  }
  for (const name of HANDLERS) if (old[name] !== next[name]) old[name] = next[name];
  if (!old.keep) fit(old, [...next.childNodes]);
}

/** A link inside the console: `link('gw-1:7000', 'gateways', 'gw-1:7000')`. */
export const link = (text, ...path) => h('a', { href: to(...path) }, text);
export const to = (...path) => '#/' + path.map(encodeURIComponent).join('/');

/** A table; at the width of a phone each row becomes a card. Cells are nodes or texts; a column is its title, or { title, number }. */
export function table(caption, columns, rows, foot) {
  const named = columns.map((column) => (typeof column === 'string' ? { title: column } : column));
  // What has several parts stays together where rows are cards: there each part would be a column.
  const whole = (cell) => (Array.isArray(cell) ? h('div', null, cell) : cell);
  const cells = (row, tag) => row.map((cell, i) => h(tag, { 'data-label': named[i].title, class: named[i].number && 'number' }, whole(cell)));
  return h('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': caption },
    h('table', null,
      h('caption', null, caption),
      h('thead', null, h('tr', null, named.map((column) => h('th', { scope: 'col', class: column.number && 'number' }, column.title)))),
      h('tbody', null, rows.map((row) => h('tr', { key: row.key, class: row.class }, cells(row.cells, 'td')))),
      foot && h('tfoot', null, h('tr', null, cells(foot, 'td')))));
}

/** A word in a colour that says how bad it is: good, warn, bad, idle. */
export const badge = (word, how) => h('span', { class: `badge ${how}` }, word);

/** Names and values, side by side. */
export function facts(pairs) {
  return h('dl', { class: 'facts' }, pairs.filter(Boolean).map(([name, value]) => h('div', null, h('dt', null, name), h('dd', null, value))));
}

export const section = (title, ...content) => h('section', { key: title }, h('h2', null, title), content);
export const empty = (...content) => h('p', { class: 'empty' }, content);
export const notice = (how, ...content) => h('p', { class: `notice ${how}` }, content);
