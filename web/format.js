// Numbers and times as they are shown. All times are UTC, as in the logs.

import { h } from './dom.js';

const whole = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat('en', { maximumSignificantDigits: 3 });
const known = (value) => value !== undefined && value !== null;

export const count = (value) => (known(value) ? whole.format(value) : '–');
export const rate = (value) => (known(value) ? (value >= 100 ? whole : short).format(value) : '–');
export const percent = (share) => (known(share) ? `${short.format(Math.floor(share * 1000) / 10)}\u00a0%` : '–');
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** A length of time in the largest two units that matter. */
export function span(ms) {
  if (!known(ms)) return '–';
  const s = Math.round(Math.abs(ms) / 1000);
  if (Math.abs(ms) < 1000) return `${Math.round(Math.abs(ms))} ms`;
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** What is left of a time, or since when it is over. */
export const left = (ms) => (known(ms) && ms < 0 ? `over for ${span(ms)}` : span(ms));

/** As a clock that runs backwards: 4:07. */
export const countdown = (ms) => `${Math.floor(ms / 60_000)}:${String(Math.floor(ms / 1000) % 60).padStart(2, '0')}`;

const iso = (ms) => new Date(ms).toISOString();
export const clock = (ms) => `${iso(ms).slice(11, 19)}Z`;

/** A moment: the time if it is of today, the date besides if not. */
export function when(ms) {
  if (!ms) return '–';
  const text = iso(ms);
  const today = text.slice(0, 10) === iso(Date.now()).slice(0, 10);
  const shown = today ? clock(ms) : `${text.slice(0, 10)} ${clock(ms)}`;
  return h('time', { datetime: text, title: `${new Date(ms).toLocaleString()} here` }, shown);
}

export function bytes(n) {
  if (!known(n)) return '–';
  const units = ['B', 'KiB', 'MiB', 'GiB'];
  const power = Math.min(3, Math.floor(Math.log2(Math.max(1, n)) / 10));
  return `${short.format(n / 1024 ** power)} ${units[power]}`;
}
