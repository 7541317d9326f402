// Everything that is shown passes here. Text becomes text nodes, never markup, and characters that could turn or hide
// text (bidirectional overrides, zero-width, control characters) are written out as what they are.

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

export function visible(text) {
  return String(text).replace(HIDDEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else node.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return node;
}

export const el = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);
export const svg = (tag, props = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
export const $ = (id) => document.getElementById(id);

/** Sets a text only when it differs: what is read aloud or selected stays undisturbed. */
export function say(node, text) {
  const shown = visible(text);
  if (node.textContent !== shown) node.textContent = shown;
}

const shelves = new WeakMap();

/**
 * Makes `parent` hold one node for each item, in order, reusing the nodes of known keys: focus and selection survive.
 * `make(item)` gives {node, update?(item)}.
 */
export function keyed(parent, items, keyOf, make) {
  const known = shelves.get(parent) ?? new Map();
  const next = new Map();
  let before = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    if (next.has(key)) continue;
    const entry = known.get(key) ?? make(item);
    entry.update?.(item);
    next.set(key, entry);
    if (entry.node === before) before = before.nextSibling;
    else parent.insertBefore(entry.node, before);
  }
  while (before) {
    const gone = before;
    before = before.nextSibling;
    gone.remove();
  }
  shelves.set(parent, next);
}

const whole = new Intl.NumberFormat("en-US");
const HOUR = 3600, DAY = 86400;

export const count = (n) => (n === null || n === undefined ? "–" : whole.format(n));

/** Three figures at most after which nobody looks: 0.42, 8.3, 312. */
export function figure(n) {
  if (n === null || n === undefined || Number.isNaN(n)) return "–";
  const size = Math.abs(n);
  if (size >= 100) return whole.format(Math.round(n));
  if (size >= 10) return n.toFixed(1).replace(/\.0$/, "");
  return size === 0 ? "0" : n.toFixed(size < 1 ? 2 : 1);
}

export function ms(n) {
  if (n === null || n === undefined) return "–";
  return n >= 1000 ? `${figure(n / 1000)} s` : `${figure(n)} ms`;
}

export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < HOUR) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  if (s < DAY) return `${Math.floor(s / HOUR)} h ${String(Math.floor((s % HOUR) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / DAY)} d ${Math.floor((s % DAY) / HOUR)} h`;
}

/** Micro-USD as dollars; below a cent with as many places as there are. */
export function usd(micro) {
  if (micro === null || micro === undefined) return "–";
  const dollars = micro / 1e6;
  const tiny = micro !== 0 && Math.abs(micro) < 10_000;
  return (micro < 0 ? "−$" : "$") + Math.abs(dollars).toLocaleString("en-US", {
    minimumFractionDigits: 2, maximumFractionDigits: tiny ? 6 : 2,
  });
}

export function bytes(n) {
  if (n < 1024) return `${n} B`;
  const steps = ["KiB", "MiB", "GiB", "TiB"];
  let i = -1;
  do { n /= 1024; i += 1; } while (n >= 1024 && i < steps.length - 1);
  return `${figure(n)} ${steps[i]}`;
}

const clockTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const minuteTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

export const hms = (at) => (Number.isNaN(+at) ? "?" : clockTime.format(at));
export const hm = (at) => minuteTime.format(at);

/** A time as <time>: the hour of today here, all of it in the title. */
export function when(at) {
  const date = new Date(at);
  if (Number.isNaN(+date)) return el("span", { class: "when" }, at ?? "");
  const today = date.toDateString() === new Date().toDateString();
  return el("time", { class: "when", datetime: date.toISOString(), title: date.toString() },
    today ? hms(date) : `${date.toLocaleDateString("en-CA")} ${hms(date)}`);
}

/** A link within the page: `#task=…`. Nothing from outside ever becomes the scheme of an address. */
export const link = (what, id, text = id, props = {}) =>
  el("a", { href: `#${what}=${encodeURIComponent(id)}`, class: "ref", ...props }, el("bdi", {}, text));

export const playbook = (name, text = "what to do") => el("a", { href: `/playbooks/${name}`, class: "book" }, text);
