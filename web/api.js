// The REST API under `api/v1`, as this tab may use it.

const TOKEN = 'im-presence.token';
const DEADLINE_MS = 10_000;

/** What an answer that is none says: problem+json, or that nobody answered (status 0). */
export class Problem extends Error {
  constructor(status, body = {}) {
    super(body.detail || body.title || `the server answered ${status}`);
    this.status = status;
    this.field = body.field;
    this.retryAfterMs = body.retry_after_ms;
  }
}

/** Called when a credential is needed, or the one that was given does not count any more. */
export const onSignedOut = { call: () => {} };

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

const query = (params) => {
  const given = Object.entries(params ?? {}).filter(([, value]) => value !== undefined && value !== null && value !== '');
  return given.length ? `?${new URLSearchParams(given)}` : '';
};
const path = (parts) => `api/v1/${parts.map(encodeURIComponent).join('/')}`;

async function ask(url, init, signal) {
  const headers = { ...init.headers };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  let response;
  try {
    response = await fetch(url, { ...init, headers, signal, cache: 'no-store', credentials: 'same-origin', redirect: 'error' });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Problem(0, { detail: error.name === 'TimeoutError' ? 'the node did not answer within 10 s' : 'the node does not answer' });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) onSignedOut.call(token.get() !== null);
  throw new Problem(response.status, body);
}

const within = (signal) => AbortSignal.any([AbortSignal.timeout(DEADLINE_MS), ...(signal ? [signal] : [])]);

/** `get(['users', 42], { limit: 10 }, signal)` */
export async function get(parts, params, signal) {
  const response = await ask(path(parts) + query(params), {}, within(signal));
  return response.json();
}

/** A change. `params` go into the query, `body` is JSON. */
export async function send(method, parts, params, body) {
  const init = body === undefined ? { method } : { method, body: JSON.stringify(body), headers: { 'content-type': 'application/json' } };
  const response = await ask(path(parts) + query(params), init, within());
  return response.status === 204 ? {} : response.json();
}

/** Events as they come, until the stream ends or `signal` says so. EventSource cannot send a token, so this reads them itself. */
export async function follow(parts, lastId, onEvent, signal) {
  const headers = { accept: 'text/event-stream', ...(lastId ? { 'last-event-id': lastId } : {}) };
  const response = await ask(path(parts), { headers }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split('\n\n');
    rest = blocks.pop();
    for (const block of blocks) {
      const event = {};
      for (const line of block.split('\n')) {
        const [, name, text] = /^(\w+): ?(.*)$/.exec(line) ?? [];
        if (name) event[name] = name === 'data' && event.data !== undefined ? `${event.data}\n${text}` : text;
      }
      if (event.data !== undefined || event.event) onEvent(event);
    }
  }
}
