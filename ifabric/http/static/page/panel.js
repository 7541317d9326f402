// The side panel: all about one task, session, account or breaker.

import { $, el, count, link, playbook, span, usd, visible, when } from "./dom.js";
import { get } from "./api.js";
import { actButton, cancelTask, closeBreaker, onActing, openBreaker, requeueTask, setLimit } from "./operator.js";
import { eventLine } from "./feed.js";

const CANCELLABLE = new Set(["pending", "claimed", "blocked"]);
const REQUEUEABLE = new Set(["dead", "cancelled"]);
const TEXT_MAX = 200_000;

const section = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);

function rows(pairs) {
  return el("dl", { class: "facts wide" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false)
    .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

const links = (what, ids) => (ids?.length ? el("span", { class: "many" }, ids.slice(0, 100).map((id) => link(what, id, id, { class: "ref chip" })), ids.length > 100 ? ` and ${ids.length - 100} more` : "") : "");
const chips = (words) => (words?.length ? el("span", { class: "many" }, words.map((w) => el("span", { class: "chip plain" }, el("bdi", {}, w)))) : "");

/** Any JSON as text, each line its own direction. */
function json(value) {
  let text = visible(typeof value === "string" ? JSON.stringify(value) : JSON.stringify(value, null, 2));
  if (text.length > TEXT_MAX) text = `${text.slice(0, TEXT_MAX)}\n… and ${count(text.length - TEXT_MAX)} more characters`;
  return el("pre", { tabindex: "0", dir: "ltr" }, text);
}

export class Panel {
  constructor(feed, refusals, now) {
    this.feed = feed;
    this.refusals = refusals;
    this.now = now;
    this.open = null;
    this.back = null;
    this.asked = 0;
    $("panel-close").addEventListener("click", () => this.leave());
    addEventListener("keydown", (e) => { if (e.key === "Escape" && this.open && !$("dialog").open) this.leave(); });
    onActing(() => this.again());
  }

  leave() { history.pushState(null, "", location.pathname); this.close(); }

  close() {
    if (!this.open) return;
    this.open = null;
    $("panel").hidden = true;
    document.body.classList.remove("with-panel");
    if (this.back?.isConnected) this.back.focus();
  }

  show(what, id) {
    if (this.open?.what === what && this.open?.id === id) return;
    if (!this.open) this.back = document.activeElement;
    this.open = { what, id };
    const title = $("panel-title");
    title.replaceChildren(el("small", {}, what), " ", el("bdi", { class: "id" }, id));
    $("panel-body").replaceChildren(el("p", { class: "none" }, "Asking…"));
    $("panel").hidden = false;
    document.body.classList.add("with-panel");
    title.focus();
    this.fill();
  }

  /** Asks again about what is open, keeping the place that is read. */
  again() { if (this.open) this.fill(); }

  async fill() {
    const asked = ++this.asked;
    const { what, id } = this.open;
    let parts;
    try {
      parts = await { task: () => this.task(id), session: () => this.session(id), account: () => this.account(id), breaker: () => this.breaker(id) }[what]();
    } catch (error) {
      parts = [el("p", { class: "outcome bad", role: "alert" }, error.message)];
    }
    if (asked !== this.asked || !this.open) return;
    const body = $("panel-body"), top = body.scrollTop;
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset?.keep : null;
    body.replaceChildren(...parts.filter(Boolean));
    body.scrollTop = top;
    if (focused) body.querySelector(`[data-keep="${focused}"]`)?.focus();
  }

  onEvents(events) {
    if (!this.open || this.soon) return;
    const { what, id } = this.open;
    if (!events.some((e) => e[what] === id)) return;
    this.soon = setTimeout(() => { this.soon = 0; this.again(); }, 300);
  }

  lately(test, title = "Events since this page opened") {
    const found = this.feed.about(test);
    return section(title, found.length ? el("ul", { class: "rows" }, found.map(eventLine)) : el("p", { class: "none" }, "None."));
  }

  refused(test) {
    const found = this.refusals.about(test);
    return found.length ? section("Refusals", el("ul", { class: "rows" }, found.map((r) => this.refusals.make(r)))) : null;
  }

  async task(id) {
    const t = await get("task", { task: id });
    const acts = el("div", { class: "panel-acts" });
    if (CANCELLABLE.has(t.state)) acts.append(keep(actButton("Cancel…", () => cancelTask(id, t.session)), "cancel"));
    if (REQUEUEABLE.has(t.state)) acts.append(keep(actButton("Requeue…", () => requeueTask(id)), "requeue"));
    const s = t.spec ?? {};
    const history = [...(t.history ?? [])].reverse();
    return [
      el("p", { class: "panel-state", "data-state": t.state }, el("span", { class: "state" }, t.state), s.title ? el("bdi", {}, s.title) : ""),
      acts,
      t.error ? el("p", { class: "outcome bad" }, el("bdi", {}, t.error)) : null,
      rows([["Held by", t.session ? link("session", t.session) : ""], ["Attempt", `${t.attempt ?? 0} of ${s.max_attempts ?? 3}`], ["Fence", t.fence ? String(t.fence) : ""],
        ["Waiting for", links("task", t.waiting_for)], ["Depends on", links("task", s.depends_on)], ["Needs", chips(s.needs)], ["Wants", chips(s.wants)], ["Labels", chips(s.labels)],
        ["Priority", s.priority ? count(s.priority) : ""], ["Deadline of a claim", s.deadline_s ? span(s.deadline_s) : ""], ["Budget", s.budget_micro_usd !== undefined && s.budget_micro_usd !== null ? usd(s.budget_micro_usd) : ""], ["Revision", count(t.revision)]]),
      section("History", history.length ? el("ol", { class: "timeline" }, history.map((h) => el("li", { class: "happened" }, when(h.at), el("b", { class: "what" }, h.event), h.session ? link("session", h.session) : "", h.fence ? el("span", { class: "sub num" }, `fence ${h.fence}`) : "", h.note ? el("bdi", { class: "sub" }, h.note) : ""))) : el("p", { class: "none" }, "Nothing is kept.")),
      s.payload !== undefined && s.payload !== null ? section("Payload", json(s.payload)) : null,
      t.result !== undefined && t.result !== null ? section("Result", json(t.result)) : null,
      this.refused((r) => r.task === id),
      this.lately((e) => e.task === id || e.example === id),
    ];
  }

  async session(id) {
    const reply = await get("sessions", { match: id, limit: 1000 });
    const s = reply.sessions.find((one) => one.session === id);
    const buttons = el("div", { class: "panel-acts" },
      el("button", { type: "button", class: "button small", "data-keep": "f1", on: { click: () => { this.refusals.filter(id); $("refusals").scrollIntoView(); } } }, "Filter refusals"),
      el("button", { type: "button", class: "button small", "data-keep": "f2", on: { click: () => { this.feed.filter(id); $("feed").scrollIntoView(); } } }, "Filter events"));
    return [
      s ? rows([["Lease", s.ttl_s ? `${span(s.ttl_s)}: a session that is silent for so long is gone, and what it holds is free` : ""], ["Account", s.account ? link("account", s.account) : ""], ["Capabilities", chips(s.capabilities)], ["Holds", s.claims?.length ? el("span", {}, links("task", s.claims), s.held > s.claims.length ? ` and ${count(s.held - s.claims.length)} more` : "") : "nothing"]])
        : el("p", { class: "none" }, "It is not connected now: it has said goodbye, or its lease ran out."),
      buttons,
      this.refused((r) => r.session === id) ?? section("Refusals", el("p", { class: "none" }, "None lately.")),
      this.lately((e) => e.session === id),
    ];
  }

  async account(id) {
    const reply = await get("account", { account: id });
    const own = reply.path?.find((l) => l.account === id);
    const acts = el("div", { class: "panel-acts" }, keep(actButton("Set its limit…", () => setLimit(id, own?.limit, own?.window, (own?.spent ?? 0) + (own?.held ?? 0))), "limit"));
    return [
      acts,
      section("From the root down", el("div", { class: "table-box" }, el("table", {}, el("thead", {}, el("tr", {}, ["Account", "Limit", "Spent", "Held", "Left"].map((h, i) => el("th", { scope: "col", class: i ? "num" : "" }, h)))),
        el("tbody", {}, (reply.path ?? []).map((l) => el("tr", {}, el("th", { scope: "row" }, link("account", l.account)), el("td", { class: "num" }, l.limit === null || l.limit === undefined ? "none" : `${usd(l.limit)}${l.window && l.window !== "total" ? ` a ${l.window}` : ""}`), el("td", { class: "num" }, usd(l.spent)), el("td", { class: "num" }, usd(l.held)), el("td", { class: "num" }, l.available === null || l.available === undefined ? "–" : usd(l.available)))))))),
      section("Open holds", reply.holds?.length ? el("ul", { class: "rows" }, reply.holds.slice(0, 200).map((h) => el("li", { class: "happened" }, when(h.at), el("b", { class: "num" }, usd(h.amount)), link("session", h.session), h.task ? link("task", h.task) : "", el("bdi", { class: "sub" }, h.hold)))) : el("p", { class: "none" }, "None."), reply.more || reply.holds?.length > 200 ? el("p", { class: "sub" }, "There are more.") : ""),
      el("p", {}, playbook("budget", "When a budget runs out: what to do")),
      this.lately((e) => e.account === id),
    ];
  }

  async breaker(id) {
    const reply = await get("breakers");
    const b = reply.breakers.find((one) => one.breaker === id) ?? { state: "closed", failures: 0 };
    const acts = el("div", { class: "panel-acts" });
    if (!(b.state === "open" && (b.probe_in_s === undefined || b.probe_in_s === null))) acts.append(keep(actButton("Open…", () => openBreaker(id)), "open"));
    if (b.state !== "closed") acts.append(keep(actButton("Close…", () => closeBreaker(id)), "close"));
    return [
      el("p", { class: "panel-state", "data-state": b.state }, el("span", { class: "state" }, b.state.replace("_", " "))),
      acts,
      rows([["Failures in the window", count(b.failures)], ["Calls in the window", b.calls ? count(b.calls) : ""], ["Opened", b.opened_ago_s !== undefined && b.opened_ago_s !== null ? `${span(b.opened_ago_s)} ago` : ""],
        ["Next probe", b.probe_in_s !== undefined && b.probe_in_s !== null ? `in ${span(b.probe_in_s)}` : b.state === "open" ? "none: until an operator closes it" : ""], ["Times opened without recovery", b.trips ? count(b.trips) : ""], ["By", b.by], ["Why", b.why]]),
      el("p", {}, playbook("breaker", "When a breaker is open: what to do")),
      this.refused((r) => JSON.stringify(r).includes(id)),
      this.lately((e) => e.breaker === id),
    ];
  }
}

function keep(button, name) { button.dataset.keep = name; return button; }

