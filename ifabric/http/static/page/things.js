// Breakers, sessions, budgets, sandboxes: each with its own small list.

import { $, el, say, count, keyed, link, ms, span, usd, when } from "./dom.js";
import { get } from "./api.js";
import { actButton, closeBreaker, killRun, openBreaker, setLimit } from "./operator.js";

const PAGE = 100;
const POLL_MS = 10_000;   // what is only listed, not streamed; an act of one's own is followed by a look at once

/** Calls `look` now and again while `node` is in view and the page is too; at once when it comes into view. */
export function whileSeen(node, look, every = POLL_MS) {
  let seen = false, last = -Infinity, busy = false;
  const go = async (force = false) => {
    if (busy || !seen || document.hidden || (!force && performance.now() - last < every)) return;
    busy = true;
    last = performance.now();
    try { await look(); } finally { busy = false; }
  };
  new IntersectionObserver(([entry]) => { seen = entry.isIntersecting; go(); }).observe(node);
  setInterval(go, 1000);
  return { now: () => { last = -Infinity; return go(true); } };
}

const empty = (text) => el("li", { class: "none" }, text);
const bar = (...parts) => el("span", { class: "bar", "aria-hidden": "true" }, parts);

function width(node, share) { node.style.width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`; }

// -- breakers ---------------------------------------------------------------------------------------------------------

const QUIET_MAX = 50;
const WORST_FIRST = { open: 0, half_open: 1, closed: 2 };

export class Breakers {
  constructor() {
    this.list = $("breakers-list");
    this.details = new Map();
    this.known = new Set();
    this.shape = "";
    setInterval(() => this.tick(), 250);
    this.lines = new Set();
  }

  onNow(now) {
    if (!now.breakers) { say($("breakers-meta"), now.missing?.["governor.breakers"] ?? "not known now"); return; }
    // One that is closed and quiet is no longer told of: who saw it open sees that it is closed now.
    const told = new Set(now.breakers.map((b) => b.breaker));
    for (const name of told) this.known.add(name);
    const quiet = [...this.known].filter((name) => !told.has(name)).slice(-QUIET_MAX).map((breaker) => ({ breaker, state: "closed", failures: 0 }));
    const breakers = [...now.breakers, ...quiet].sort((a, b) => (WORST_FIRST[a.state] ?? 3) - (WORST_FIRST[b.state] ?? 3) || (a.breaker < b.breaker ? -1 : 1));
    const heard = performance.now();
    for (const b of breakers) b.heard = heard;
    const open = breakers.filter((b) => b.state === "open").length;
    say($("breakers-meta"), breakers.length ? `${open} open of ${breakers.length}` : "");
    const shape = JSON.stringify(breakers.map((b) => [b.breaker, b.state]));
    if (shape !== this.shape) { this.shape = shape; if (breakers.some((b) => b.state !== "closed")) this.ask(); }
    if (!breakers.length) { this.lines.clear(); keyed(this.list, [null], () => "", () => ({ node: empty("Every breaker is closed. One that is used or opened is shown here.") })); return; }
    this.lines = new Set();
    keyed(this.list, breakers, (b) => b.breaker, (b) => this.make(b));
    this.tick();
  }

  async ask() {
    try {
      const reply = await get("breakers");
      this.details = new Map(reply.breakers.map((b) => [b.breaker, b]));
    } catch { /* who holds it open is told by the next change */ }
  }

  make(first) {
    const state = el("span", { class: "state" }), sub = el("span", { class: "sub" }), left = el("b", { class: "num countdown" });
    const fill = el("i", { class: "fill" }), track = bar(fill);
    const acts = el("span", { class: "acts" });
    const node = el("li", { class: "item breaker", "data-breaker": first.breaker }, el("div", { class: "line" }, state, link("breaker", first.breaker, first.breaker, { class: "ref id" }), el("span", { class: "grow" }), left, acts),
      el("div", { class: "line" }, sub), track);
    acts.append(actButton("Open", () => openBreaker(first.breaker), "opens"), actButton("Close", () => closeBreaker(first.breaker), "closes"));
    const entry = { node, b: first };
    entry.update = (b) => {
      entry.b = b;
      this.lines.add(entry);
      if (b.state !== "open") entry.whole = 0;
      entry.whole = Math.max(entry.whole ?? 0, b.probe_in_s ?? 0);
      node.dataset.state = b.state;
      say(state, b.state.replace("_", " "));
      for (const button of acts.children) button.hidden = button.classList.contains("opens") ? b.state === "open" && b.probe_in_s === undefined : b.state === "closed";
      track.hidden = b.state !== "open" || b.probe_in_s === undefined || b.probe_in_s === null;
    };
    entry.tick = (now) => {
      const b = entry.b, gone = (now - b.heard) / 1000, more = this.details.get(b.breaker);
      const parts = b.failures || b.state === "closed" ? [`${count(b.failures)} ${b.failures === 1 ? "failure" : "failures"} in the window`] : [];
      if (b.opened_ago_s !== undefined && b.opened_ago_s !== null && b.state !== "closed") parts.unshift(`for ${span(b.opened_ago_s + gone)}`);
      if (more?.by && b.state !== "closed") parts.push(`held by ${more.by}${more.why ? `: ${more.why}` : ""}`);
      say(sub, parts.join(" · "));
      if (b.state === "open" && b.probe_in_s !== undefined && b.probe_in_s !== null) {
        const rest = Math.max(0, b.probe_in_s - gone);
        say(left, rest > 0 ? `probe in ${rest < 60 ? `${rest.toFixed(1)} s` : span(rest)}` : "probe due");
        width(fill, entry.whole ? rest / entry.whole : 0);
      } else say(left, b.state === "open" ? "until closed by hand" : b.state === "half_open" ? "probing" : "");
    };
    return entry;
  }

  tick() {
    if (document.hidden) return;
    const now = performance.now();
    for (const line of this.lines) line.tick(now);
  }
}

// -- sessions ---------------------------------------------------------------------------------------------------------

export class Sessions {
  constructor() {
    this.list = $("sessions-list");
    this.limit = PAGE;
    this.match = "";
    this.watch = whileSeen($("sessions"), () => this.look());
    let typing = 0;
    $("sessions-search").addEventListener("input", (e) => {
      clearTimeout(typing);
      typing = setTimeout(() => { this.match = e.target.value.trim(); this.limit = PAGE; this.watch.now(); }, 250);
    });
  }

  onCount(now) {
    if (now.sessions !== this.had) { this.had = now.sessions; this.watch.now(); }
  }

  async look() {
    try {
      const found = [];
      let after, total = 0;
      do {
        const reply = await get("sessions", { match: this.match, limit: Math.min(1000, this.limit - found.length), after });
        found.push(...reply.sessions);
        after = reply.after;
        total = reply.total ?? found.length;
      } while (after && found.length < this.limit);
      this.show(found, after, total);
    } catch (error) { say($("sessions-meta"), error.message); }
  }

  show(found, after, total) {
    say($("sessions-meta"), this.match ? `${count(found.length)}${after ? "+" : ""} found of ${count(total)}` : found.length < total ? `${count(found.length)} of ${count(total)}` : count(total));
    const items = [...found];
    if (!items.length) items.push({ none: this.match ? `No session's name contains “${this.match}”.` : "No session is connected. Agents say hello, then they are here." });
    if (after) items.push({ more: true });
    keyed(this.list, items, (s) => (s.session !== undefined ? `s ${s.session}` : s.more ? "more" : `none ${s.none}`), (s) => {
      if (s.none) return { node: empty(s.none) };
      if (s.more) return { node: el("li", { class: "more" }, el("button", { type: "button", class: "button small", on: { click: () => { this.limit += PAGE; this.watch.now(); } } }, "Show more")) };
      return this.make(s);
    });
  }

  make(first) {
    const lease = el("span", { class: "num sub" }), about = el("span", { class: "sub" }), held = el("span", { class: "held-tasks" });
    const node = el("li", { class: "item" },
      el("div", { class: "line" }, link("session", first.session, first.session, { class: "ref id" }), el("span", { class: "grow" }), lease),
      el("div", { class: "line wrap" }, held, about));
    const entry = { node };
    entry.update = (s) => {
      say(lease, s.ttl_s ? `lease of ${span(s.ttl_s)}` : "");
      say(about, [s.account, s.capabilities?.length ? s.capabilities.join(", ") : ""].filter(Boolean).join(" · ") || (s.claims?.length ? "" : "no capabilities told"));
      const claims = s.claims ?? [], number = Math.max(s.held ?? 0, claims.length);
      const stamp = `${number}\n${claims.join("\n")}`;
      if (entry.stamp !== stamp) {
        entry.stamp = stamp;
        held.replaceChildren(claims.length ? el("span", { class: "sub" }, `holds ${count(number)}: `) : el("span", { class: "sub" }, "holds nothing"),
          ...claims.slice(0, 3).map((t) => link("task", t, t, { class: "ref chip" })), number > 3 ? el("span", { class: "sub" }, `and ${count(number - 3)} more`) : "");
      }
    };
    return entry;
  }
}

/** Sessions' own accounts are counted as one, which is called @. */
export const accountName = (account) => (account === "@" ? "a session's own" : account);

// -- budgets ----------------------------------------------------------------------------------------------------------

export class Budgets {
  constructor() {
    this.root = { list: $("budgets-tree"), limit: PAGE, parent: undefined };
    this.opened = new Map();
    this.watch = whileSeen($("budgets"), () => this.look());
    $("budgets-tree").addEventListener("keydown", (e) => this.key(e));
  }

  async look() {
    try {
      await this.fill(this.root);
      for (const branch of [...this.opened.values()]) if (branch.list.isConnected) await this.fill(branch);
    } catch (error) { say($("budgets-meta"), error.message); }
  }

  onNow(now) {
    const [fullest] = Object.entries(now.budget_fullest ?? {}).sort((a, b) => b[1] - a[1]);
    say($("budgets-meta"), fullest && fullest[1] > 0 ? `fullest: ${accountName(fullest[0])}, ${Math.round(fullest[1] * 100)} %` : "");
  }

  async fill(branch) {
    const found = [];
    let after, total = 0;
    do {
      const reply = await get("accounts", { parent: branch.parent, limit: Math.min(1000, branch.limit - found.length), after });
      found.push(...reply.accounts);
      after = reply.after;
      total = reply.total ?? found.length;
    } while (after && found.length < branch.limit);
    if (!found.length) { keyed(branch.list, [null], () => "", () => ({ node: el("p", { class: "none" }, branch.parent ? "Nothing below it." : "No account has a limit or a charge yet.") })); return; }
    const items = [...found, ...(after ? [{ more: total - found.length }] : [])];
    keyed(branch.list, items, (a) => a.account ?? "\nmore", (a) => (a.account === undefined
      ? { node: el("div", { class: "more" }, el("button", { type: "button", class: "button small", on: { click: () => { branch.limit += PAGE; this.fill(branch); } } }, "Show more")) }
      : this.make(a)));
  }

  make(first) {
    const name = first.account.split("/").at(-1);
    const spent = el("i", { class: "fill spent" }), held = el("i", { class: "fill held" });
    const numbers = el("span", { class: "numbers num" });
    const twist = el("button", { type: "button", class: "twist", tabindex: "-1", "aria-hidden": "true" }, "›");
    const act = actButton("Limit…", () => setLimit(entry.a.account, entry.a.limit_micro_usd, entry.a.window, entry.a.spent_micro_usd + entry.a.held_micro_usd));
    const group = el("div", { class: "branch", role: "group" });
    const line = el("div", { class: "line" }, twist, link("account", first.account, name, { class: "ref id", tabindex: "-1", title: first.account }), el("span", { class: "grow" }), numbers, act);
    const node = el("div", { class: "account", role: "treeitem", tabindex: "-1", "data-account": first.account }, line, bar(spent, held), group);
    const entry = { node };
    const toggle = (open) => {
      if (!(entry.a.children > 0)) return;
      node.setAttribute("aria-expanded", String(open));
      if (open) { const branch = { list: group, limit: PAGE, parent: first.account }; this.opened.set(first.account, branch); this.fill(branch).catch((e) => say($("budgets-meta"), e.message)); }
      else { this.opened.delete(first.account); keyed(group, [], () => "", () => null); }
    };
    node.toggle = toggle;
    twist.addEventListener("click", () => toggle(node.getAttribute("aria-expanded") !== "true"));
    entry.update = (a) => {
      entry.a = a;
      const limit = a.limit_micro_usd, used = a.spent_micro_usd + a.held_micro_usd;
      const scale = limit === null || limit === undefined ? used : Math.max(limit, used);
      width(spent, scale ? a.spent_micro_usd / scale : 0);
      width(held, scale ? a.held_micro_usd / scale : 0);
      node.classList.toggle("unlimited", limit === null || limit === undefined);
      node.dataset.level = limit && used / limit >= 0.95 ? "bad" : limit && used / limit >= 0.8 ? "warn" : "";
      say(numbers, limit === null || limit === undefined ? `${usd(a.spent_micro_usd)} spent · ${usd(a.held_micro_usd)} held · no limit`
        : `${usd(a.available_micro_usd)} left of ${usd(limit)}${a.window && a.window !== "total" ? ` a ${a.window}` : ""}`);
      numbers.title = `${usd(a.spent_micro_usd)} spent, ${usd(a.held_micro_usd)} held, ${a.available_micro_usd === null || a.available_micro_usd === undefined ? "no limit" : `${usd(a.available_micro_usd)} available`}`;
      node.setAttribute("aria-label", `${a.account}: ${numbers.title}`);
      if (a.children > 0) { if (!node.hasAttribute("aria-expanded")) node.setAttribute("aria-expanded", "false"); } else node.removeAttribute("aria-expanded");
    };
    return entry;
  }

  key(event) {
    const all = [...this.root.list.querySelectorAll(".account")];
    const at = all.indexOf(document.activeElement);
    const node = all[at];
    const open = node?.getAttribute("aria-expanded");
    const go = { ArrowDown: () => all[at + 1] ?? node, ArrowUp: () => all[Math.max(0, at - 1)], Home: () => all[0], End: () => all.at(-1),
      ArrowRight: () => { if (open === "false") node.toggle(true); return open === "true" ? all[at + 1] : node; },
      ArrowLeft: () => { if (open === "true") { node.toggle(false); return node; } return node?.parentElement.closest(".account") ?? node; } }[event.key];
    if (go) { event.preventDefault(); go()?.focus(); }
    else if (event.key === "Enter" && node && event.target === node) location.hash = `account=${encodeURIComponent(node.dataset.account)}`;
  }
}

// -- sandboxes --------------------------------------------------------------------------------------------------------

export class Sandboxes {
  constructor() {
    this.runs = el("ul", { class: "rows", "aria-label": "Runs of more than a second" });
    this.pool = el("dl", { class: "facts" });
    this.violations = el("ul", { class: "rows", "aria-label": "Violations" });
    $("sandboxes-body").append(this.pool, this.runs, this.violations);
    this.lines = new Set();
    this.watch = whileSeen($("sandboxes"), () => this.look());
    setInterval(() => { if (!document.hidden) for (const l of this.lines) l.tick(); }, 1000);
  }

  async look() {
    let reply;
    try { reply = await get("sandboxes"); } catch (error) {
      say($("sandboxes-meta"), "");
      facts(this.pool, [["Sandboxes", error.message, ""]]);
      return;
    }
    const { workers: pool, slo, runs } = reply;
    say($("sandboxes-meta"), pool ? `${pool.busy} of ${pool.max} busy` : "");
    const rows = [];
    if (pool) rows.push(["Workers", `${pool.busy} busy, ${pool.idle} idle, ${pool.max} at most`, ""], ["Queue", count(pool.queued), pool.queued > 0 ? "warn" : ""]);
    if (slo) rows.push(
      ["Latency p95", slo.runs ? `${ms(slo.latency_p95_ms)}, target ${ms(slo.target_latency_p95_ms)}` : "no runs in the window", slo.runs && slo.latency_p95_ms > slo.target_latency_p95_ms ? "warn" : ""],
      ["Availability", slo.runs ? `${slo.availability_percent.toFixed(2)} %, target ${slo.target_availability_percent} %` : "no runs in the window", slo.runs && slo.availability_percent < slo.target_availability_percent ? "bad" : ""],
      ["Error budget left", `${Math.round(slo.error_budget_left * 100)} %`, slo.error_budget_left <= 0 ? "bad" : slo.error_budget_left < 0.25 ? "warn" : ""]);
    facts(this.pool, rows);
    const heard = performance.now();
    this.lines = new Set();
    const items = runs.map((r) => ({ ...r, heard }));
    keyed(this.runs, items.length ? items : [{ none: true }], (r) => r.run ?? "", (r) => (r.none ? { node: empty("Nothing has run for longer than a second.") } : this.make(r)));
  }

  make(first) {
    const left = el("span", { class: "num sub" }), fill = el("i", { class: "fill" });
    const node = el("li", { class: "item" },
      el("div", { class: "line" }, el("bdi", { class: "id" }, first.run), el("span", { class: "grow" }), left, actButton("Kill", () => killRun(first.run, first.session))),
      el("div", { class: "line wrap sub" }, link("session", first.session), first.task ? link("task", first.task) : "", el("bdi", {}, String(first.module).slice(0, 19)), first.daemon ? el("bdi", {}, first.daemon) : ""), bar(fill));
    const entry = { node, update: (r) => { entry.r = r; this.lines.add(entry); entry.tick(); } };
    entry.tick = () => {
      const gone = (performance.now() - entry.r.heard) / 1000, rest = Math.max(0, entry.r.wall_left_s - gone), age = entry.r.age_s + gone;
      say(left, `runs ${span(age)}, ${span(rest)} left`);
      width(fill, rest / (rest + age));
    };
    return entry;
  }

  onEvent(event) {
    this.violations.prepend(el("li", { class: "item warnline" }, el("div", { class: "line wrap" }, el("span", { class: "state" }, event.kind ?? "violation"), link("session", event.session ?? ""), when(event.at)), el("div", { class: "sub" }, event.message ?? "")));
    while (this.violations.children.length > 20) this.violations.lastChild.remove();
  }
}

/** Names and values, with how they stand ("" | warn | bad | good) and what more is known. */
export function facts(list, rows) {
  keyed(list, rows, ([name]) => name, ([name]) => {
    const value = el("span", { class: "fact num" }), more = el("small", { class: "sub" });
    const node = el("div", {}, el("dt", {}, name), el("dd", {}, value, more));
    return { node, update: ([, text, level, detail]) => { say(value, text); say(more, detail ?? ""); more.hidden = !detail; node.dataset.level = level ?? ""; } };
  });
}

