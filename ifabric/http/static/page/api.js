// The way to the daemon: reading, acting, and the stream, which is read with fetch because it may need a token.

const SILENT_MS = 12_000;        // a word comes every second; after so long without one the connection is given up
const BACKOFF_MS = [500, 1000, 2000, 4000, 8000, 15000];
const KEPT = "ifabric-operator";

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `The daemon answered ${status}.`);
    this.status = status;
    this.code = error?.code ?? "";
    this.facts = error ?? {};
  }
}

const tokens = { viewer: "", operator: stored() };
const listeners = new Set();

function stored() {
  try { return sessionStorage.getItem(KEPT) ?? ""; } catch { return ""; }
}

export const isOperator = () => tokens.operator !== "";
export const onOperator = (told) => { listeners.add(told); told(isOperator()); };

export function setOperator(token, keep) {
  tokens.operator = token;
  try {
    if (token && keep) sessionStorage.setItem(KEPT, token);
    else sessionStorage.removeItem(KEPT);
  } catch { /* no storage: in memory only */ }
  for (const told of listeners) told(isOperator());
}

export function setViewer(token) { tokens.viewer = token; }

function looking() {
  const token = tokens.viewer || tokens.operator;
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function answered(response) {
  let body = null;
  try { body = await response.json(); } catch { /* not JSON: the status says it */ }
  if (!response.ok) throw new Refused(response.status, body?.error);
  return body;
}

export async function get(path, params = {}, signal = undefined) {
  const query = new URLSearchParams(Object.entries(params).filter(([, v]) => v !== undefined && v !== null && v !== ""));
  const text = query.toString();
  return answered(await fetch(`/api/${path}${text ? `?${text}` : ""}`, { headers: looking(), cache: "no-store", signal }));
}

export async function act(action, body) {
  const headers = { "Content-Type": "application/json" };
  if (tokens.operator) headers.Authorization = `Bearer ${tokens.operator}`;
  return answered(await fetch(`/api/actions/${action}`, { method: "POST", headers, body: JSON.stringify(body), cache: "no-store" }));
}

/** Server-sent events out of a body's text. */
class Parser {
  constructor(told) { this.told = told; this.rest = ""; this.event = "message"; this.data = []; }

  feed(text) {
    const lines = (this.rest + text).split(/\r\n|\n/);
    this.rest = lines.pop();
    for (const line of lines) this.line(line);
  }

  line(line) {
    if (line === "") {
      if (this.data.length) this.told(this.event, this.data.join("\n"));
      this.event = "message";
      this.data = [];
      return;
    }
    const at = line.indexOf(":");
    if (at === 0) return;
    const field = at < 0 ? line : line.slice(0, at);
    const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
    if (field === "event") this.event = value;
    else if (field === "data") this.data.push(value);
  }
}

/**
 * Keeps the stream open for as long as the page is. `told(event, data)` for each message;
 * `link(state)` with {up} | {up: false, why, retryAt} | {needsToken}.
 */
export class Stream {
  constructor(told, link) {
    this.told = told;
    this.link = link;
    this.tries = 0;
    this.wake = () => {};
    addEventListener("online", () => this.now());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.now(); });
  }

  now() { this.tries = 0; this.wake(); }

  async run() {
    for (;;) {
      let why;
      try {
        why = await this.once();
      } catch (error) {
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          this.link({ up: false, needsToken: true, why: error.status === 403 ? error.message : "" });
          await new Promise((go) => { this.wake = go; });
          continue;
        }
        why = error instanceof Refused ? error.message : "";
      }
      const pause = BACKOFF_MS[Math.min(this.tries, BACKOFF_MS.length - 1)] * (0.8 + 0.4 * Math.random());
      this.tries += 1;
      this.link({ up: false, why, retryAt: performance.now() + pause });
      await new Promise((go) => { this.wake = go; setTimeout(go, pause); });
      this.wake = () => {};
      this.link({ up: false, why, retryAt: null });
    }
  }

  async once() {
    const ending = new AbortController();
    let silence = setTimeout(() => ending.abort(), SILENT_MS);
    const heard = () => { clearTimeout(silence); silence = setTimeout(() => ending.abort(), SILENT_MS); };
    try {
      const response = await fetch("/api/stream", { headers: { ...looking(), Accept: "text/event-stream" }, cache: "no-store", signal: ending.signal });
      if (!response.ok) return await answered(response);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = new Parser((event, data) => {
        this.tries = 0;
        let value;
        try { value = JSON.parse(data); } catch { return; }
        this.told(event, value);
      });
      this.link({ up: true });
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return "the daemon ended the connection";
        heard();
        parser.feed(value);
      }
    } finally {
      clearTimeout(silence);
      ending.abort();
    }
  }
}
