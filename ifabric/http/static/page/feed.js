// What happens, as it happens: events and refusals, the newest on top, each list with a filter.

import { $, el, say, count, link, usd, when } from "./dom.js";

const KEPT = 1000;     // what a list remembers
const SHOWN = 200;     // and what of it stands in the page

class Stack {
  /** options: {list, make(item), fits(item), none} */
  constructor(options) { this.o = options; this.items = []; this.known = new Set(); this.paused = false; this.held = 0; }

  /** What came before is not told twice: after a reconnect the last refusals come again, and a daemon that is not sure
   * that an event was taken publishes it again. */
  fresh(items) {
    const fresh = items.filter((item) => {
      const key = JSON.stringify(item);
      return !this.known.has(key) && this.known.add(key);
    });
    if (this.known.size > 4 * KEPT) this.known = new Set([...this.known].slice(-2 * KEPT));
    return fresh;
  }

  add(arrived) {
    const items = this.fresh(arrived);
    if (!items.length) return;
    this.items.unshift(...[...items].reverse());
    if (this.items.length > KEPT) this.items.length = KEPT;
    if (this.paused) { this.held += items.length; this.o.told?.(); return; }
    const fresh = items.filter((i) => this.o.fits(i)).slice(-SHOWN);
    if (!fresh.length) { this.o.told?.(); return; }
    this.o.list.querySelector(".none")?.remove();
    // Who reads further down keeps the place: the browser anchors the scroll unless the list is at its top.
    this.o.list.prepend(...fresh.reverse().map((i) => this.o.make(i)));
    while (this.o.list.children.length > SHOWN) this.o.list.lastChild.remove();
    this.o.told?.();
  }

  again() {
    const fit = this.items.filter((i) => this.o.fits(i)).slice(0, SHOWN);
    this.o.list.replaceChildren(...(fit.length ? fit.map((i) => this.o.make(i)) : [el("li", { class: "none" }, this.items.length ? "Nothing that came since this page opened fits the filter." : this.o.none)]));
    this.held = 0;
    this.o.told?.();
  }

  pause(on) { this.paused = on; if (!on) this.again(); else this.o.told?.(); }
}

const kindOf = (event) => (event.subject ?? "").split(".")[3] ?? "";
const BAD = new Set(["dead", "failed", "expired", "opened", "violation", "overdraft", "actor_restarted", "renew_lost", "unmatched"]);

/** An event in a few words, with links to whom it is about. */
export function eventLine(event) {
  const kind = kindOf(event);
  const parts = [when(event.at), el("span", { class: "kind" }, kind), el("b", { class: "what" }, event.event ?? "")];
  if (event.task) parts.push(link("task", event.task));
  if (event.example) parts.push(link("task", event.example));
  if (event.breaker) parts.push(link("breaker", event.breaker));
  if (event.account) parts.push(link("account", event.account));
  if (event.session) parts.push(link("session", event.session));
  if (event.charged) parts.push(el("span", { class: "num" }, `${usd(event.charged)} charged`));
  else if (event.amount) parts.push(el("span", { class: "num" }, `${usd(event.amount)} held`));
  const words = event.note || event.why || event.message || event.reason || (event.missing?.length ? `missing ${event.missing.join(", ")}` : "");
  if (words) parts.push(el("bdi", { class: "sub" }, String(words).slice(0, 300)));
  return el("li", { class: `happened ${BAD.has(event.event) ? "badly" : ""}` }, parts);
}

export class Feed {
  constructor() {
    this.dropped = 0;
    const kinds = ["", "task", "budget", "breaker", "chassis", "match", "fabric"];
    $("feed-kind").append(...kinds.map((k) => el("option", { value: k }, k || "all kinds")));
    this.stack = new Stack({ list: $("feed-list"), make: eventLine, none: "Nothing has happened since this page opened.",
      fits: (e) => (!this.kind || kindOf(e) === this.kind) && (!this.words || JSON.stringify(e).toLowerCase().includes(this.words)), told: () => this.meta() });
    this.kind = "";
    this.words = "";
    $("feed-kind").addEventListener("change", (e) => { this.kind = e.target.value; this.stack.again(); });
    $("feed-search").addEventListener("input", (e) => this.filter(e.target.value));
    $("feed-pause").addEventListener("click", () => {
      const on = !this.stack.paused;
      this.stack.pause(on);
      say($("feed-pause"), on ? "Go on" : "Pause");
      $("feed-pause").setAttribute("aria-pressed", String(on));
    });
    this.stack.again();
  }

  filter(text) { this.words = text.trim().toLowerCase(); if ($("feed-search").value !== text) $("feed-search").value = text; this.stack.again(); }

  add(events) {
    const real = events.filter((e) => e.event !== undefined);
    this.dropped += events.reduce((n, e) => n + (e.event === undefined ? e.dropped ?? 0 : 0), 0);
    this.stack.add(real);
  }

  about(test, most = 50) { return this.stack.items.filter(test).slice(0, most); }

  meta() {
    say($("feed-meta"), [this.stack.paused ? `paused, ${count(this.stack.held)} new` : "", this.dropped ? `${count(this.dropped)} left out` : ""].filter(Boolean).join(" · "));
  }
}

export class Refusals {
  constructor() {
    this.words = "";
    this.stack = new Stack({ list: $("refusals-list"), make: (r) => this.make(r), none: "Nothing has been refused lately.",
      fits: (r) => !this.words || JSON.stringify(r).toLowerCase().includes(this.words), told: () => this.meta() });
    $("refusals-search").addEventListener("input", (e) => this.filter(e.target.value));
    this.stack.again();
  }

  filter(text) { this.words = text.trim().toLowerCase(); if ($("refusals-search").value !== text) $("refusals-search").value = text; this.stack.again(); }

  add(refusals) { this.stack.add(refusals); }

  about(test, most = 20) { return this.stack.items.filter(test).slice(0, most); }

  make(r) {
    return el("li", { class: "item refusal" },
      el("div", { class: "line wrap" }, when(r.at), el("b", { class: "what" }, r.code ?? ""), el("span", { class: "sub" }, `${r.component ?? ""}.${r.verb ?? ""}`),
        r.session ? el("button", { type: "button", class: "chip", title: "Only this session's", on: { click: () => this.filter(r.session) } }, el("bdi", {}, r.session)) : "",
        r.task ? el("button", { type: "button", class: "chip", title: "Only this task's", on: { click: () => this.filter(r.task) } }, el("bdi", {}, r.task)) : ""),
      el("div", { class: "sub words" }, el("bdi", {}, r.why ?? "")));
  }

  meta() {
    const codes = new Map();
    for (const r of this.stack.items) codes.set(r.code, (codes.get(r.code) ?? 0) + 1);
    say($("refusals-meta"), [...codes].sort((a, b) => b[1] - a[1]).slice(0, 2).map(([code, n]) => `${n} ${code}`).join(" · "));
  }
}
