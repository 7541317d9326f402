// The task board: one list of any length. Rows exist only for what is in view; the tasks come in pages, each from the
// id where the page before it ends, so a far jump walks there in great strides and every later look is at hand.

import { $, el, say, count, link } from "./dom.js";
import { get } from "./api.js";

export const STATES = ["pending", "claimed", "blocked", "done", "dead", "cancelled"];
const NEAR = 100, FAR = 1000;     // tasks in a page: in view at first, and on the way to a far place
const KEPT_PAGES = 24;            // pages whose rows are kept
const ROWS_MAX = 400_000;         // browsers cannot scroll further; the search does
const OVERSCAN = 6;
const STALE_MS = 5000;            // what is in view is asked for again when something changed since

class Pages {
  constructor(changed) { this.changed = changed; this.begin({}); }

  begin(query) {
    this.ending?.abort();
    this.ending = new AbortController();
    this.query = query;
    this.pages = [];              // {start, limit, after, size, rows | null, at}
    this.ended = false;
    this.wanted = [0, NEAR];
    this.error = "";
    this.working = false;
  }

  get known() { const last = this.pages.at(-1); return last ? last.start + last.size : 0; }

  row(i) {
    const page = this.holding(i);
    return page?.rows?.[i - page.start];
  }

  holding(i) {
    let low = 0, high = this.pages.length - 1;
    while (low <= high) {
      const middle = (low + high) >> 1, page = this.pages[middle];
      if (i < page.start) high = middle - 1;
      else if (i >= page.start + page.size) low = middle + 1;
      else return page;
    }
    return null;
  }

  /** What is looked at now: it is fetched, before anything else. */
  want(from, to) { this.wanted = [from, to]; this.work(); }

  missing() {
    const [from, to] = this.wanted;
    for (const page of this.pages) if (page.start < to && page.start + page.size > from && !page.rows) return page;
    if (!this.ended && (this.known < to || !this.pages.length)) {
      const far = to - this.known > 2 * NEAR;
      return { start: this.known, limit: far ? FAR : NEAR, after: this.pages.at(-1)?.next, size: 0, rows: null, fresh: true };
    }
    return null;
  }

  async work() {
    if (this.working) return;
    this.working = true;
    const { signal } = this.ending;
    try {
      for (let page = this.missing(); page; page = this.missing()) await this.load(page, signal);
    } catch (error) {
      if (signal.aborted) return;
      this.error = error.message;
      this.changed();
    } finally {
      if (this.ending.signal === signal) this.working = false;
    }
  }

  async load(page, signal) {
    const asked = performance.now();
    const reply = await get("tasks", { ...this.query, limit: page.limit, after: page.after }, signal);
    if (signal.aborted) return;
    this.error = "";
    const moved = !page.fresh && page.size !== reply.tasks.length;
    page.rows = reply.tasks;
    page.size = reply.tasks.length;
    page.at = asked;
    page.next = reply.after;
    if (page.fresh) { page.fresh = false; if (page.size || !this.pages.length) this.pages.push(page); }
    const place = this.pages.indexOf(page);
    if (place >= 0 && place < this.pages.length - 1 && (moved || this.pages[place + 1].after !== reply.after)) this.pages.length = place + 1;
    if (place === this.pages.length - 1) this.ended = !reply.after;
    this.forget();
    this.changed(reply.counts);
  }

  forget() {
    const [from] = this.wanted;
    const kept = this.pages.filter((p) => p.rows);
    if (kept.length <= KEPT_PAGES) return;
    kept.sort((a, b) => Math.abs(b.start - from) - Math.abs(a.start - from));
    for (const page of kept.slice(0, kept.length - KEPT_PAGES)) page.rows = null;
  }

  /** Asks again for what is in view, and for what follows when it has moved. */
  async renew() {
    if (this.working) return;
    this.working = true;
    const { signal } = this.ending;
    const [from, to] = this.wanted;
    try {
      for (const page of this.pages.filter((p) => p.start < to && p.start + Math.max(p.size, 1) > from)) await this.load(page, signal);
    } catch (error) {
      if (!signal.aborted) { this.error = error.message; this.changed(); }
    } finally {
      if (this.ending.signal === signal) { this.working = false; this.work(); }
    }
  }

  /** An event tells of a task: its row follows at once. */
  patch(event) {
    for (const page of this.pages) for (const row of page.rows ?? []) if (row.task === event.task) {
      if (event.state) row.state = event.state;
      row.session = event.state === "claimed" ? event.session : undefined;
      if (event.attempt) row.attempt = event.attempt;
      return true;
    }
    return false;
  }
}

export class Board {
  constructor(open) {
    this.open = open;
    this.scroller = $("tasks-list");
    this.spacer = this.scroller.firstElementChild;
    this.state = "";
    this.match = "";
    this.counts = {};
    this.rows = [];
    this.active = -1;
    this.changedAt = 0;
    this.pages = new Pages((counts) => { if (counts && !this.match) this.setCounts(counts); this.paint(); });
    this.makeTabs();
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    this.scroller.addEventListener("keydown", (e) => this.key(e));
    this.scroller.addEventListener("focus", () => { if (this.active < 0) this.activate(this.first(), false); });
    new ResizeObserver(() => this.draw()).observe(this.scroller);
    let typing = 0;
    $("tasks-search").addEventListener("input", (e) => {
      clearTimeout(typing);
      typing = setTimeout(() => this.look(this.state, e.target.value.trim()), 250);
    });
    this.seen = true;
    new IntersectionObserver(([entry]) => { this.seen = entry.isIntersecting; }).observe(this.scroller);
  }

  get total() {
    const { known, ended } = this.pages;
    if (ended) return known;
    const told = this.match ? 0 : this.state ? this.counts[this.state] ?? 0 : STATES.reduce((n, s) => n + (this.counts[s] ?? 0), 0);
    return Math.min(ROWS_MAX, Math.max(told, known + (this.match || !told ? 1 : 0)));
  }

  makeTabs() {
    this.tabs = ["", ...STATES].map((state) => {
      const number = el("b", { class: "num" }, "–");
      const tab = el("button", { type: "button", role: "tab", class: "tab", "data-state": state || "all", "aria-controls": "tasks-list",
        on: { click: () => this.look(state, this.match) } }, el("i", { class: "pip", "aria-hidden": "true" }), state || "all", number);
      return { state, tab, number };
    });
    const box = $("tasks-tabs");
    box.append(...this.tabs.map((t) => t.tab));
    box.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (!step) return;
      e.preventDefault();
      const now = this.tabs.findIndex((t) => t.state === this.state);
      const next = this.tabs[(now + step + this.tabs.length) % this.tabs.length];
      this.look(next.state, this.match);
      next.tab.focus();
    });
  }

  look(state, match, { record = true } = {}) {
    this.state = STATES.includes(state) ? state : "";
    this.match = match;
    if ($("tasks-search").value.trim() !== match) $("tasks-search").value = match;
    for (const t of this.tabs) {
      t.tab.setAttribute("aria-selected", String(t.state === this.state));
      t.tab.tabIndex = t.state === this.state ? 0 : -1;
    }
    this.active = -1;
    this.scroller.scrollTop = 0;
    this.scroller.removeAttribute("aria-activedescendant");
    this.pages.begin({ state: this.state, match });
    if (record) this.onLook?.(this.state, this.match);
    this.paint();
  }

  setCounts(counts) {
    const before = JSON.stringify(this.counts);
    this.counts = counts;
    if (JSON.stringify(counts) !== before) this.changedAt = performance.now();
    const all = STATES.reduce((n, s) => n + (counts[s] ?? 0), 0);
    for (const t of this.tabs) say(t.number, count(t.state ? counts[t.state] ?? 0 : all));
  }

  onNow(now) {
    if (now.counts) this.setCounts(now.counts);
    const shown = this.pages.holding(this.first());
    if (!document.hidden && this.seen && (!shown || (shown.at < this.changedAt && performance.now() - shown.at > STALE_MS))) this.pages.renew();
    this.draw();
  }

  onEvents(events) {
    for (const event of events) if (event.task) {
      this.changedAt = performance.now();
      this.pages.patch(event);
    }
    this.draw();
  }

  first() { return Math.floor(this.scroller.scrollTop / this.height()); }

  height() { return matchMedia("(max-width: 720px)").matches ? 60 : 36; }

  draw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this.paint(); });
  }

  paint() {
    const h = this.height(), total = this.total, view = this.scroller.clientHeight || 400;
    this.spacer.style.height = `${total * h}px`;
    const from = Math.max(0, Math.floor(this.scroller.scrollTop / h) - OVERSCAN);
    const to = Math.min(total, from + Math.ceil(view / h) + 2 * OVERSCAN);
    const need = to - from;
    while (this.rows.length < need) { const row = new Row(this); this.rows.push(row); this.spacer.append(row.node); }
    while (this.rows.length > Math.max(need, 40)) this.rows.pop().node.remove();
    this.rows.forEach((row, slot) => {
      // a row of the pool serves the places that are equal to it modulo the pool: scrolling by one changes one row
      const i = from + ((slot - (from % this.rows.length) + this.rows.length) % this.rows.length);
      if (i < to) row.show(i, h, this.pages.row(i), total, i === this.active);
      else row.hide();
    });
    const { known, ended, error } = this.pages;
    const empty = $("tasks-empty");
    empty.hidden = !(ended && total === 0) && !error;
    if (!empty.hidden) say(empty, error || (this.match ? `No task's id or title contains “${this.match}”${this.state ? ` among the ${this.state}` : ""}.` : this.state ? `No task is ${this.state}.` : "The board is empty. Put tasks on it: ifabric board load TASKS.md"));
    const walking = !ended && known < to;
    say($("tasks-meta"), walking ? `on the way: ${count(known)} of ${this.match ? "…" : count(total)}` : this.match ? `${count(known)}${ended ? "" : "+"} found` : "");
    if (this.started) this.pages.want(from, Math.max(to, from + 1));
  }

  start() { this.started = true; this.paint(); }

  key(event) {
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.height()) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      event.preventDefault();
      this.activate(Math.min(this.total - 1, Math.max(0, Math.max(this.active, 0) + moves[event.key])), true);
    } else if (event.key === "Enter" || event.key === " ") {
      const row = this.pages.row(this.active);
      if (row) { event.preventDefault(); this.open(row.task); }
    }
  }

  activate(i, scroll) {
    if (i < 0 || this.total === 0) return;
    this.active = i;
    const h = this.height(), top = i * h, s = this.scroller;
    if (scroll) {
      if (top < s.scrollTop) s.scrollTop = top;
      else if (top + h > s.scrollTop + s.clientHeight) s.scrollTop = top + h - s.clientHeight;
    }
    s.setAttribute("aria-activedescendant", `task-row-${i}`);
    this.paint();
  }
}

class Row {
  constructor(board) {
    this.cells = { state: el("span", { class: "state" }), id: el("bdi", { class: "id" }), title: el("bdi", { class: "title" }),
      needs: el("span", { class: "needs" }), session: el("span", { class: "by" }), attempt: el("span", { class: "num" }), priority: el("span", { class: "num" }) };
    this.node = el("div", { class: "row", role: "option", on: { click: (e) => {
      if (e.target.closest("a")) return;
      const row = board.pages.row(this.i);
      board.active = this.i;
      if (row) board.open(row.task);
    } } }, Object.values(this.cells));
  }

  show(i, h, row, total, active) {
    this.node.hidden = false;
    this.node.style.transform = `translateY(${i * h}px)`;
    if (this.i !== i) { this.i = i; this.node.id = `task-row-${i}`; this.node.setAttribute("aria-posinset", i + 1); }
    this.node.setAttribute("aria-setsize", total);
    this.node.setAttribute("aria-selected", String(active));
    this.node.classList.toggle("active", active);
    this.node.classList.toggle("loading", !row);
    const stamp = row ? `${row.task}\n${row.state}\n${row.session}\n${row.attempt}\n${row.title}\n${row.priority}` : "";
    if (stamp === this.stamp) return;
    this.stamp = stamp;
    const c = this.cells;
    this.node.dataset.state = row?.state ?? "";
    say(c.state, row?.state ?? "");
    say(c.id, row?.task ?? "");
    c.id.title = row?.task ?? "";
    say(c.title, row?.title ?? "");
    c.title.title = row?.title ?? "";
    say(c.needs, row?.needs?.join(", ") ?? "");
    c.session.replaceChildren(...(row?.session ? [link("session", row.session, row.session, { tabindex: "-1" })] : []));
    say(c.attempt, row && row.max_attempts ? `${row.attempt ?? 0} / ${row.max_attempts}` : "");
    say(c.priority, row?.priority ? count(row.priority) : "");
  }

  hide() { this.node.hidden = true; this.i = -1; this.stamp = null; }
}

