// What the daemon says of itself: the line on top, the tiles, the actors, the cluster.

import { $, el, say, count, figure, hms, keyed, ms, playbook, span } from "./dom.js";
import { accountName, facts } from "./things.js";

const LAG_WARN_S = 0.1;
const P95_TARGET_MS = 10;
const BUDGET_WARN = 0.9;
export { P95_TARGET_MS };

export class Status {
  constructor() {
    this.last = null;
    this.heardAt = 0;
    this.link = { up: false };
    this.since = null;
    setInterval(() => this.show(), 500);
  }

  onLink(link) { this.link = link; this.show(); }

  onNow(now) {
    this.heardAt = performance.now();
    const status = now.health?.status ?? "starting";
    if (status !== this.status) {
      this.since = this.status === undefined ? { from: new Date(), seen: false } : { from: new Date(), seen: true };
      this.status = status;
    }
    this.last = now;
    this.notices(now);
    this.show();
  }

  show() {
    const { level, word, why, since } = this.words();
    $("status").dataset.level = level;
    say($("status-word"), word);
    say($("status-why"), why);
    say($("status-since"), since);
    $("retry").hidden = level !== "lost";
    document.body.classList.toggle("stale", level === "lost" && this.last !== null);
    document.title = level === "healthy" ? "InfraFabric" : `${word} · InfraFabric`;
  }

  words() {
    const age = (performance.now() - this.heardAt) / 1000;
    if (this.link.needsToken) return { level: "lost", word: "Locked", why: "The daemon asks for a token before it shows anything.", since: "" };
    if (!this.link.up || (this.last && age > 4)) {
      if (!this.last) return this.link.retryAt !== undefined ? { level: "lost", word: "Connection lost", why: `The daemon has not answered yet. ${this.again()}`, since: "" } : { level: "waiting", word: "Connecting", why: "Waiting for the daemon's first word.", since: "" };
      return { level: "lost", word: "Connection lost", why: `What you see is ${span(age)} old. ${this.again()}`, since: `last word ${hms(new Date(Date.now() - age * 1000))}` };
    }
    if (!this.last) return { level: "waiting", word: "Connecting", why: "Waiting for the daemon's first word.", since: "" };
    const health = this.last.health ?? {};
    const reasons = (health.not_ready ?? []).filter((r) => r !== health.status);
    const known = { healthy: "Healthy", degraded: "Degraded", draining: "Draining", starting: "Starting" };
    const sentence = {
      healthy: `etcd and NATS answer, and ${this.running(health)}.`,
      degraded: reasons.length ? `${capital(reasons.join("; "))}. ${means(health)}` : "The daemon gives no reason.",
      draining: `It finishes what it has begun and takes nothing new.${reasons.length ? ` ${capital(reasons.join("; "))}.` : ""}`,
      starting: reasons.length ? `${capital(reasons.join("; "))}.` : "Not ready for requests yet.",
    };
    return { level: known[health.status] ? health.status : "degraded", word: known[health.status] ?? String(health.status), why: sentence[health.status] ?? "", since: this.sinceWhen(health) };
  }

  again() {
    const { retryAt, why } = this.link;
    const reason = why ? `${capital(why)}. ` : "";
    if (!retryAt) return `${reason}Trying…`;
    const rest = Math.ceil((retryAt - performance.now()) / 1000);
    return rest > 0 ? `${reason}Trying again in ${rest} s.` : `${reason}Trying…`;
  }

  sinceWhen(health) {
    // What was seen to change is known to the second. What was so before this page opened is told by the parts: trouble
    // is as old as the oldest of it, health as young as the last part that came back.
    const ages = parts(health).filter((p) => (health.status === "healthy") === p.up).map((p) => p.since_s);
    let age = this.since?.seen ? (Date.now() - this.since.from) / 1000 : null;
    if (age === null && ages.length) age = health.status === "healthy" ? Math.min(...ages) : Math.max(...ages);
    if (age === null) return this.since ? `at least since ${hms(this.since.from)}` : "";
    const from = new Date(Date.now() - age * 1000);
    return `since ${age > 86400 ? `${from.toLocaleDateString("en-CA")} ` : ""}${hms(from)} (${span(age)})`;
  }

  running(health) {
    const all = leaves(health.actors);
    return all.length ? `all ${all.length} actors run` : "everything runs";
  }

  notices(now) {
    const found = [];
    const add = (key, level, text, target, book) => found.push({ key, level, text, target, book });
    const health = now.health ?? {};
    if (health.dependencies?.vault?.up === false) add("vault", "warn", `Vault is ${health.dependencies.vault.state}`, "cluster", "degraded");
    if (health.etcd && health.etcd !== "connected") add("etcd", "bad", `etcd is ${health.etcd}`, "cluster", health.etcd === "full" ? "etcd-full" : "etcd-down");
    if (health.nats && health.nats !== "connected") add("nats", "bad", `NATS is ${health.nats}`, "cluster", "nats-down");
    const broken = leaves(health.actors).filter((a) => a.state !== "running");
    if (broken.length) add("actors", "bad", `${broken.map((a) => a.name).join(", ")} not running`, "actors", "actor-restarts");
    const open = (now.breakers ?? []).filter((b) => b.state !== "closed");
    if (open.length) add("breakers", "warn", `${open.length} ${open.length === 1 ? "breaker is" : "breakers are"} not closed`, "breakers", "breaker");
    if (now.unmatched > 0) add("unmatched", "warn", `${count(now.unmatched)} ${now.unmatched === 1 ? "task" : "tasks"} no session can take`, "tasks", "unmatched");
    const full = Object.entries(now.budget_fullest ?? {}).filter(([, share]) => share >= BUDGET_WARN).sort((a, b) => b[1] - a[1]);
    if (full.length) add("budget", "warn", `${accountName(full[0][0])} has used ${Math.round(full[0][1] * 100)} % of its budget${full.length > 1 ? `, ${full.length - 1} more` : ""}`, "budgets", "budget");
    if (now.counts?.dead > 0) add("dead", "warn", `${count(now.counts.dead)} dead ${now.counts.dead === 1 ? "task" : "tasks"}`, "dead", null);
    const loop = health.dependencies?.loop;
    if (loop ? loop.up === false : health.loop_lag_s > LAG_WARN_S) add("lag", "warn", `the loop is late, ${loop?.detail || `by ${ms(health.loop_lag_s * 1000)}`}`, "cluster", "loop-lag");
    if (this.p95 > P95_TARGET_MS) add("p95", "warn", `claims take ${ms(this.p95)} at p95`, "chart-latency", "latency");
    if (now.audit?.dropped > 0) add("audit", "bad", `${count(now.audit.dropped)} audit records dropped`, "cluster", "audit");
    const warnings = (health.warnings ?? []).filter((w) => !/^(loop|vault) is /.test(w)).length;  // those two are told above
    if (warnings) add("warnings", "warn", `${warnings} ${warnings === 1 ? "warning" : "warnings"}`, "cluster", null);
    keyed($("notices"), found, (n) => n.key, (n) => {
      const go = el("a", { href: n.target === "dead" ? "#state=dead" : `#${n.target}`, ...(n.target === "dead" ? {} : { "data-jump": n.target }) });
      const node = el("li", { class: "notice" }, go, n.book && playbook(n.book));
      return { node, update: (m) => { say(go, m.text); node.dataset.level = m.level; } };
    });
  }
}

/** The dependencies and the actors, each with whether it is up and for how long that is so. */
function parts(health) {
  return [...Object.entries(health.dependencies ?? {}).filter(([name]) => name === "etcd" || name === "nats").map(([, d]) => ({ up: d.up !== false, since_s: d.since_s ?? 0 })),
    ...leaves(health.actors).filter((a) => a.for_s !== undefined).map((a) => ({ up: a.state === "running", since_s: a.for_s }))];
}

const means = (health) => Object.values(health.dependencies ?? {}).filter((d) => d.up === false && d.means).map((d) => d.means).join(" ");

const capital = (text) => (text.startsWith("etcd") ? text : text.charAt(0).toUpperCase() + text.slice(1));

/** Those of the supervision tree that do the work. */
export function leaves(tree) {
  if (!tree) return [];
  return tree.children ? tree.children.flatMap(leaves) : [tree];
}

export class Tiles {
  constructor() {
    const tiles = [["rate", "Claims per second", "", "chart-rate"], ["p95", "Claim latency p95", "ms", "chart-latency"], ["sessions", "Sessions", "", "sessions"],
      ["active", "Active claims", "", "tasks"], ["pending", "Pending", "", "tasks"], ["unmatched", "Unmatched", "", "tasks"], ["refused", "Refused per second", "", "refusals"]];
    this.tiles = Object.fromEntries(tiles.map(([key, label, unit, target]) => {
      const value = el("b", { class: "value num" }, "–"), sub = el("span", { class: "sub" }, "\u00a0");
      const node = el("a", { class: "tile", href: `#${target}`, "data-jump": target, "data-tile": key }, el("span", { class: "label" }, label), el("span", { class: "figure" }, value, unit && el("small", {}, unit)), sub);
      $("tiles").append(node);
      return [key, { node, value, sub }];
    }));
  }

  set(key, value, sub, level = "") {
    const tile = this.tiles[key];
    say(tile.value, value);
    say(tile.sub, sub || "\u00a0");
    tile.node.dataset.level = level;
  }

  onPoints(points) {
    const p = points.at(-1);
    if (!p) return;
    const peak = Math.max(...points.map((x) => x.claims_per_s ?? 0));
    this.set("rate", figure(p.claims_per_s), `peak ${figure(peak)}`);
    this.set("p95", p.p95_ms === null || p.p95_ms === undefined ? "–" : figure(p.p95_ms), p.p50_ms === null || p.p50_ms === undefined ? "nothing claimed" : `p50 ${figure(p.p50_ms)} · p99 ${figure(p.p99_ms)}`, p.p95_ms > P95_TARGET_MS ? "warn" : "");
    this.set("refused", figure(p.refused_per_s), `of ${figure(p.handled_per_s)} handled`);
  }

  onNow(now) {
    const c = now.counts ?? {};
    this.set("sessions", count(now.sessions), now.waiters === null ? "" : now.waiters ? `${count(now.waiters)} waiting for work` : "none waiting for work");
    this.set("active", count(now.active), now.holds === null ? "" : `${count(now.holds)} ${now.holds === 1 ? "hold" : "holds"} open`);
    this.set("pending", now.counts ? count(c.pending ?? 0) : "–", !now.counts ? "not known now" : c.blocked ? `${count(c.blocked)} blocked` : "none blocked");
    this.set("unmatched", count(now.unmatched), now.unmatched === null ? "no governor here" : now.unmatched ? "no session fits" : "every task fits", now.unmatched ? "warn" : "");
  }
}

/** What is in trouble first, then the branches (the residents), then single parts: each as they were started. */
const byNeed = (a, b) => (a.state === "running") - (b.state === "running") || Boolean(b.children) - Boolean(a.children);

export class Actors {
  constructor() { this.tree = $("actors-tree"); }

  onNow(now) {
    const numbers = new Map((now.actors ?? []).map((a) => [a.actor, a]));
    const all = leaves(now.health?.actors);
    const restarts = all.reduce((n, a) => n + (a.restarts ?? 0), 0);
    say($("actors-meta"), all.length ? `${all.filter((a) => a.state === "running").length} of ${all.length} running · ${restarts} ${restarts === 1 ? "restart" : "restarts"}` : "");
    const rows = [];
    const walk = (node, depth) => { rows.push({ ...node, depth, numbers: numbers.get(node.name) }); numbers.delete(node.name); for (const child of [...(node.children ?? [])].sort(byNeed)) walk(child, depth + 1); };
    if (now.health?.actors?.children) walk(now.health.actors, 0);
    for (const rest of [...numbers.values()]) rows.push({ name: rest.actor, state: rest.state, restarts: rest.restarts, depth: 1, numbers: rest });
    keyed(this.tree, rows, (r) => `${r.depth} ${r.name}`, (r) => {
      const state = el("span", { class: "state" }), sub = el("span", { class: "sub" }), mailbox = el("span", { class: "num" });
      const node = el("div", { class: "actor", "data-depth": Math.min(r.depth, 5) }, el("div", { class: "line" }, el("bdi", { class: "id" }, r.name), state, el("span", { class: "grow" }), mailbox), el("div", { class: "sub" }, sub));
      return { node, update: (a) => {
        node.dataset.state = a.state ?? (a.children ? "branch" : "");
        say(state, a.state ?? a.strategy ?? "");
        const n = a.numbers;
        const age = a.for_s === undefined ? "" : `for ${span(a.for_s)}`;
        say(mailbox, n ? `mailbox ${count(n.mailbox)}${n.in_flight ? ` · ${count(n.in_flight)} in flight` : ""}` : age);
        const parts = [];
        if (a.restarts) parts.push(`${a.restarts} ${a.restarts === 1 ? "restart" : "restarts"}${a.reason ? `, last: ${a.reason}` : ""}`);
        if (n) parts.push(`${count(n.handled)} handled`, `${count(n.refused)} refused`, `${count(n.errors)} ${n.errors === 1 ? "error" : "errors"}`);
        if (n && age) parts.push(age);
        say(sub, parts.join(" · "));
        sub.parentNode.hidden = !parts.length;
        node.classList.toggle("restarted", a.restarts > 0);
      } };
    });
  }
}

const TITLES = { etcd: "etcd", nats: "NATS", vault: "Vault", loop: "Event loop" };

function dependency(d) {
  const told = [];
  if (d.latency_ms !== undefined) told.push(`answers in ${ms(d.latency_ms)}`);
  if (d.worst_s !== undefined) told.push(`at worst ${ms(d.worst_s * 1000)} late in a minute`);
  if (d.heard_s !== undefined) told.push(`asked ${span(d.heard_s)} ago`);
  if (d.detail) told.push(d.detail);
  if (d.means) told.push(d.means);
  return told.join(" · ");
}

const SHOWN = new Set(["dependencies", "status", "etcd", "nats", "vault", "loop_lag_s", "version", "uptime_s", "not_ready", "warnings", "actors", "since", "status_since"]);

export class Cluster {
  onNow(now) {
    const h = now.health ?? {};
    const good = (word) => (word === "connected" || word === "ok" || word === "healthy" ? "good" : word === "unused" || word === "none" ? "" : "bad");
    const rows = Object.entries(h.dependencies ?? {}).map(([name, d]) => [TITLES[name] ?? name, `${d.state} for ${span(d.since_s ?? 0)}`, d.up === false ? "bad" : d.state === "unused" ? "" : "good", dependency(d)]);
    if (!rows.length) rows.push(["etcd", words(h.etcd ?? "–"), good(h.etcd)], ["NATS", words(h.nats ?? "–"), good(h.nats)]);
    if (now.audit) rows.push(["Audit", `${count(now.audit.stored)} stored, ${count(now.audit.waiting)} waiting, ${count(now.audit.dropped)} dropped`, now.audit.dropped ? "bad" : now.audit.waiting > 1000 ? "warn" : "good"]);
    if (now.workers) rows.push(["Sandbox workers", `${count(now.workers.busy)} busy, ${count(now.workers.idle)} idle, ${count(now.queue ?? 0)} queued`, ""]);
    if (now.overhead_percent !== undefined && now.overhead_percent !== null) rows.push(["Coordination overhead", `${figure(now.overhead_percent)} % of spend`, ""]);
    for (const [key, value] of Object.entries(h)) if (!SHOWN.has(key)) for (const [name, text, level] of further(key, value)) rows.push([name, text, level]);
    rows.push(["Version", h.version ?? "–", ""], ["Up", span(h.uptime_s ?? 0), ""], ["Watching this page", count(now.viewers ?? 1), ""]);
    facts($("cluster-facts"), rows);
    const warnings = h.warnings ?? [];
    say($("cluster-meta"), warnings.length ? `${warnings.length} ${warnings.length === 1 ? "warning" : "warnings"}` : "");
    keyed($("cluster-warnings"), warnings, (w) => w, (w) => ({ node: el("li", {}, w) }));
  }
}

function words(value) {
  return typeof value === "object" && value !== null ? Object.entries(value).map(([k, v]) => `${k} ${v}`).join(", ") : String(value);
}

/** What this page does not know by name, as it is told: one row for each part. */
function further(key, value) {
  const title = key.replaceAll("_", " ");
  if (value === null || value === undefined || value === "") return [];
  if (Array.isArray(value)) return value.length ? [[title, value.map(words).join("; "), ""]] : [];
  if (typeof value !== "object") return [[title, words(value), ""]];
  return Object.entries(value).map(([name, part]) => {
    const status = typeof part === "object" && part !== null ? part.status ?? part.state : part;
    const level = ["connected", "ok", "healthy", "running", true].includes(status) ? "good" : ["disconnected", "down", "failed", "full", "expired", false].includes(status) ? "bad" : "";
    return [`${title}: ${name}`, words(part), level];
  });
}
