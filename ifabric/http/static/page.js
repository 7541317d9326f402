// The live page of one daemon: what it streams goes to the parts that show it. Nothing is built, fetched from elsewhere,
// or written as markup; see page/dom.js for the one way in which text reaches the page.

import { $, ms, figure, say } from "./page/dom.js";
import { Stream } from "./page/api.js";
import { Chart } from "./page/charts.js";
import { Board } from "./page/tasks.js";
import { Breakers, Budgets, Sandboxes, Sessions } from "./page/things.js";
import { Actors, Cluster, P95_TARGET_MS, Status, Tiles } from "./page/health.js";
import { Feed, Refusals } from "./page/feed.js";
import { Panel } from "./page/panel.js";
import { askViewer } from "./page/operator.js";

const HISTORY_S = 900;

const rate = new Chart($("chart-rate"), { title: "Claims", note: "per second", unit: "per second", area: true, nothing: "Nothing is known yet.",
  series: [{ key: "claims_per_s", label: "claims/s", look: "one" }], text: figure, axis: figure });
const latency = new Chart($("chart-latency"), { title: "Claim latency", note: "log scale", unit: "ms", log: true, nothing: "No claims in this time.",
  series: [{ key: "p50_ms", label: "p50", look: "low" }, { key: "p95_ms", label: "p95", look: "one" }, { key: "p99_ms", label: "p99", look: "high" }],
  text: ms, axis: (v) => (v >= 1000 ? `${v / 1000} s` : `${v} ms`), mark: { at: P95_TARGET_MS, label: "10 ms: target for p95" } });
const status = new Status();
const tiles = new Tiles();
const board = new Board((task) => { location.hash = `task=${encodeURIComponent(task)}`; });
const breakers = new Breakers();
const sessions = new Sessions();
const budgets = new Budgets();
const sandboxes = new Sandboxes();
const actors = new Actors();
const cluster = new Cluster();
const feed = new Feed();
const refusals = new Refusals();
const panel = new Panel(feed, refusals);

let points = [], step = 5, drawn = 0;

function onPoints() {
  const keep = (points.at(-1)?.t ?? 0) - HISTORY_S * 1000;
  points = points.filter((p) => p.t >= keep);
  status.p95 = points.at(-1)?.p95_ms;
  tiles.onPoints(points);
  drawn = points.length;
  if (document.hidden) return;
  rate.set(points, step, HISTORY_S);
  latency.set(points, step, HISTORY_S);
}

const stamped = (p) => ({ ...p, t: +new Date(p.at) });

const heard = {
  history(data) { step = data.step_s || 5; points = (data.points ?? []).map(stamped); onPoints(); },
  point(data) { points.push(stamped(data)); onPoints(); },
  now(data) {
    say($("daemon"), data.daemon ?? "");
    for (const part of [status, tiles, board, breakers, budgets, actors, cluster]) part.onNow(data);
    sessions.onCount(data);
  },
  events(data) {
    feed.add(data);
    board.onEvents(data);
    panel.onEvents(data);
    for (const e of data) if (e.event === "violation") sandboxes.onEvent(e);
  },
  refusals(data) { refusals.add(data); },
};

const stream = new Stream((event, data) => heard[event]?.(data), (link) => {
  if (link.up && !board.started) board.start();
  if (link.needsToken) askViewer(link.why, () => stream.now());
  status.onLink(link);
});
$("retry").addEventListener("click", () => stream.now());
document.addEventListener("visibilitychange", () => { if (!document.hidden && drawn) onPoints(); });

document.addEventListener("acted", () => {
  for (const part of [sessions, budgets, sandboxes]) part.watch.now();
  panel.again();
});

// -- where one is: #task=ID, #session=ID, #account=A, #breaker=B, #state=dead&match=words ------------------------------

const PANELS = ["task", "session", "account", "breaker"];

function route() {
  const where = new URLSearchParams(location.hash.slice(1));
  const what = PANELS.find((p) => where.get(p));
  if (what) { panel.show(what, where.get(what)); return; }
  panel.close();
  if (where.has("state") || where.has("match")) {
    const state = where.get("state") ?? "", match = where.get("match") ?? "";
    if (state !== board.state || match !== board.match) board.look(state, match, { record: false });
    if (!routed) return;
    $("tasks").scrollIntoView();
  }
}

let routed = false;
board.onLook = (state, match) => {
  const where = new URLSearchParams();
  if (state) where.set("state", state);
  if (match) where.set("match", match);
  history.replaceState(null, "", where.size ? `#${where}` : location.pathname);
};
addEventListener("hashchange", route);
addEventListener("popstate", route);

// Jumps within the page leave the address alone: it names a thing, or a list, and can be passed on.
document.addEventListener("click", (event) => {
  const jump = event.target.closest?.("[data-jump]");
  if (!jump || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const target = $(jump.dataset.jump);
  target.scrollIntoView({ block: "start" });
  const place = target.querySelector("[tabindex='0'], input, button") ?? target;
  place.focus({ preventScroll: true });
});
$("skip").addEventListener("click", (event) => { event.preventDefault(); $("main-content").focus(); });

// -- colours ----------------------------------------------------------------------------------------------------------

const THEMES = { "": ["◐", "as the system has them"], light: ["☀", "light"], dark: ["☾", "dark"] };

function showTheme() {
  const [sign, words] = THEMES[document.documentElement.dataset.theme ?? ""];
  say($("theme"), sign);
  $("theme").setAttribute("aria-label", `Colours: ${words}`);
  $("theme").title = `Colours: ${words}`;
}

$("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES), root = document.documentElement;
  const next = order[(order.indexOf(root.dataset.theme ?? "") + 1) % order.length];
  if (next) root.dataset.theme = next; else delete root.dataset.theme;
  try { if (next) localStorage.setItem("ifabric-theme", next); else localStorage.removeItem("ifabric-theme"); } catch { /* for this page only */ }
  showTheme();
});

// The panel stands below the bar, whose height depends on the width: what is on the bar stays within reach.
new ResizeObserver(([entry]) => document.documentElement.style.setProperty("--top", `${entry.target.offsetHeight}px`)).observe(document.querySelector(".top"));
showTheme();
board.look("", "", { record: false });
route();
routed = true;
stream.run();
