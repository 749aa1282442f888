// What the tab knows of the system right now: the last summary, how old it is, and what happened. Nothing is kept on the server.

import { follow, get } from './api.js';

const EVERY_MS = 2000;
const SILENT_AFTER_MS = 6000;
const LONGEST_PAUSE_MS = 30_000;
/** 15 minutes of charts. */
const SAMPLES = 450;
const MAX_EVENTS = 1000;

export const live = {
  summary: undefined,
  /** When the last summary came, by this machine's clock. */
  heardAt: 0,
  /** Why the last question had no answer. */
  problem: undefined,
  samples: [],
  events: [],
  /** Called on each change, and each second while nobody answers. */
  changed: () => {},
};

export const isSilent = () => Boolean(live.problem) && Date.now() - live.heardAt > SILENT_AFTER_MS;
export const role = () => live.summary?.caller?.role ?? 'operator';
export const mayAct = () => role() === 'operator';

let stop;

/** Asks for the summary every 2 s and listens to events, until `leave`. */
export function begin() {
  leave();
  stop = new AbortController();
  watchSummary(stop.signal);
  watchEvents(stop.signal);
}

export function leave() {
  stop?.abort();
  stop = undefined;
}

const pause = (ms, signal) => new Promise((done) => {
  setTimeout(done, ms);
  signal.addEventListener('abort', done, { once: true });
});

const seen = () => (document.hidden ? new Promise((done) => document.addEventListener('visibilitychange', done, { once: true })) : undefined);

async function watchSummary(signal) {
  let failures = 0;
  while (!signal.aborted) {
    await seen();
    try {
      const summary = await get(['summary'], {}, signal);
      Object.assign(live, { summary, heardAt: Date.now(), problem: undefined });
      live.samples.push({ at: summary.as_of_ms / 1000, ...summary });
      live.samples.splice(0, live.samples.length - SAMPLES);
      failures = 0;
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      live.problem = error;
      failures += 1;
    }
    live.changed();
    await pause(Math.min(EVERY_MS * 2 ** Math.max(0, failures - 1), LONGEST_PAUSE_MS), signal);
  }
}

async function watchEvents(signal) {
  let lastId;
  let failures = 0;
  while (!signal.aborted) {
    await seen();
    const hidden = new AbortController();
    const hide = () => document.hidden && hidden.abort();
    document.addEventListener('visibilitychange', hide);
    try {
      await follow(['events'], lastId, (event) => {
        lastId = event.id ?? lastId;
        failures = 0;
        note(event);
      }, AbortSignal.any([signal, hidden.signal]));
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
    }
    document.removeEventListener('visibilitychange', hide);
    failures += 1;
    await pause(Math.min(EVERY_MS * 2 ** Math.min(failures, 4), LONGEST_PAUSE_MS), signal);
  }
}

function note(event) {
  let data = {};
  try {
    data = JSON.parse(event.data ?? '{}');
  } catch {
    data = { says: event.data };
  }
  // The node says that some are missing; between when, this tab knows.
  if (event.event === 'gap') Object.assign(data, { from_ms: live.events[0]?.data.at_ms, to_ms: Date.now() });
  live.events.unshift({ id: event.id, kind: event.event ?? 'message', data });
  live.events.splice(MAX_EVENTS);
  live.changed();
}
