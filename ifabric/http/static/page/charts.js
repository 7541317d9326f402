// A line chart in SVG: axes with units, a read-out under pointer or arrow keys, and the same as a table.

import { el, svg, say, hms, hm, visible } from "./dom.js";

const LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 24;

function niceStep(max, ticks) {
  const raw = max / ticks;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
}

function linear(max) {
  const step = niceStep(Math.max(max, 1), 4);
  const top = Math.ceil(Math.max(max, 1) / step) * step;
  const ticks = [];
  for (let i = 0; i * step <= top + step / 2; i += 1) ticks.push(i * step);
  return { ticks, at: (v) => v / top };
}

/** From the power of ten below the least to the one above the greatest, at least one decade. */
function logarithmic(min, max) {
  const low = Math.floor(Math.log10(Math.max(min, 0.01)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(max, 0.02))));
  const ticks = [];
  for (let e = low; e <= high; e += 1) {
    ticks.push(10 ** e);
    if (high - low <= 2 && e < high) ticks.push(2 * 10 ** e, 5 * 10 ** e);
  }
  return { ticks, at: (v) => Math.min(1, Math.max(0, (Math.log10(Math.max(v, 1e-9)) - low) / (high - low))) };
}

export class Chart {
  /** options: {title, unit, series: [{key, label, look}], text(value), axis(value), log?, area?, mark?: {at, label}} */
  constructor(figure, options) {
    this.o = options;
    this.points = [];
    this.step = 5;
    this.span = 900;
    this.cursor = null;
    this.shown = false;
    const id = `${figure.id}-title`;
    this.time = el("span", { class: "chart-time" }, "now");
    this.values = options.series.map((s) => el("b", { class: "num" }, "–"));
    const legend = el("div", { class: "legend" }, this.time, options.series.map((s, i) =>
      el("span", { class: "legend-item" }, el("i", { class: `stroke ${s.look}`, "aria-hidden": "true" }), s.label, " ", this.values[i])));
    this.summary = el("p", { class: "sr-only", id: `${figure.id}-summary` });
    this.svg = svg("svg", { class: "plot", role: "img", "aria-labelledby": `${id} ${figure.id}-summary` });
    this.box = el("div", { class: "plot-box", tabindex: "0", role: "group", "aria-labelledby": id, "aria-describedby": `${figure.id}-help` }, this.svg);
    this.spoken = el("p", { class: "sr-only", "aria-live": "polite" });
    this.body = el("tbody");
    this.table = el("details", { class: "as-table", on: { toggle: () => this.fillTable() } },
      el("summary", {}, "As a table"),
      el("div", { class: "table-box", tabindex: "0", role: "group", "aria-label": `${options.title}, by the minute` }, el("table", {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Minute"), options.series.map((s) => el("th", { scope: "col", class: "num" }, `${s.label} (${options.unit})`)))), this.body)));
    figure.append(
      el("figcaption", { class: "head" }, el("h2", { id }, options.title, el("small", {}, ` ${options.note}`)), el("span", { class: "grow" }), legend),
      this.summary, this.box, this.spoken,
      el("p", { class: "sr-only", id: `${figure.id}-help` }, "Arrow keys move the read-out, Escape ends it."), this.table);
    this.box.addEventListener("pointermove", (e) => this.point(e.clientX - this.svg.getBoundingClientRect().left));
    this.box.addEventListener("pointerleave", () => this.leave());
    this.box.addEventListener("blur", () => this.leave());
    this.box.addEventListener("keydown", (e) => this.key(e));
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  set(points, step, span) {
    this.points = points;
    this.step = step;
    this.span = span;
    this.draw();
  }

  leave() { this.cursor = null; this.draw(); }

  point(x) {
    if (!this.points.length || !this.scale) return;
    const at = this.scale.from + ((x - LEFT) / this.scale.width) * this.span * 1000;
    let best = null;
    for (const p of this.points) if (best === null || Math.abs(p.t - at) < Math.abs(best.t - at)) best = p;
    this.cursor = best.t;
    this.draw();
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -60, PageDown: 60, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") { this.leave(); return; }
    if (!(event.key in moves) || !this.points.length) return;
    event.preventDefault();
    const found = this.points.findIndex((p) => p.t === this.cursor);
    const from = found < 0 ? this.points.length - 1 : found;
    const to = Math.min(this.points.length - 1, Math.max(0, from + moves[event.key]));
    this.cursor = this.points[to].t;
    this.draw();
    say(this.spoken, `${hms(this.points[to].t)}: ${this.o.series.map((s) => `${s.label} ${this.o.text(this.points[to][s.key])}`).join(", ")}`);
  }

  draw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this.paint(); });
  }

  paint() {
    const width = this.box.clientWidth, height = this.box.clientHeight;
    if (width < 80 || height < 60) return;
    const { series, log, area, mark, axis } = this.o;
    const last = this.points.at(-1)?.t ?? Date.now();
    const from = last - this.span * 1000;
    const plotWidth = width - LEFT - RIGHT, plotHeight = height - TOP - BOTTOM;
    this.scale = { from, width: plotWidth };
    const known = this.points.flatMap((p) => series.map((s) => p[s.key])).filter((v) => v !== null && v !== undefined);
    const max = known.length ? Math.max(...known) : 0;
    const y = log ? logarithmic(known.length ? Math.min(...known) : 1, Math.max(max, (mark?.at ?? 0) * 1.5)) : linear(max);
    const px = (t) => LEFT + ((t - from) / (this.span * 1000)) * plotWidth;
    const py = (v) => TOP + (1 - y.at(v)) * plotHeight;
    const parts = [];
    for (const tick of y.ticks) {
      parts.push(svg("line", { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: py(tick), y2: py(tick) }),
        svg("text", { class: "tick", x: LEFT - 8, y: py(tick) + 4, "text-anchor": "end" }, axis(tick)));
    }
    parts.push(...this.timeTicks(from, last, px, height, plotWidth));
    if (mark) {
      parts.push(svg("line", { class: "target", x1: LEFT, x2: width - RIGHT, y1: py(mark.at), y2: py(mark.at) }),
        svg("text", { class: "target-label", x: width - RIGHT - 2, y: py(mark.at) - 5, "text-anchor": "end" }, mark.label));
    }
    for (const s of series) {
      const runs = this.runs(s.key);
      if (area) for (const run of runs) {
        const line = run.map((p) => `${px(p.t).toFixed(1)} ${py(p[s.key]).toFixed(1)}`).join("L");
        parts.push(svg("path", { class: `area ${s.look}`, d: `M${px(run[0].t).toFixed(1)} ${py(0)}L${line}L${px(run.at(-1).t).toFixed(1)} ${py(0)}Z` }));
      }
      const d = runs.map((run) => `M${run.map((p) => `${px(p.t).toFixed(1)} ${py(p[s.key]).toFixed(1)}`).join("L")}${run.length === 1 ? "h1" : ""}`).join("");
      parts.push(svg("path", { class: `series ${s.look}`, d }));
    }
    const read = this.points.find((p) => p.t === this.cursor) ?? this.points.at(-1);
    if (this.cursor !== null && read) {
      parts.push(svg("line", { class: "cursor", x1: px(read.t), x2: px(read.t), y1: TOP, y2: height - BOTTOM }));
      for (const s of series) if (read[s.key] !== null && read[s.key] !== undefined)
        parts.push(svg("circle", { class: `dot ${s.look}`, cx: px(read.t), cy: py(read[s.key]), r: 4 }));
    }
    if (!known.length) parts.push(svg("text", { class: "nothing", x: LEFT + plotWidth / 2, y: TOP + plotHeight / 2, "text-anchor": "middle" }, this.o.nothing));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...parts);
    say(this.time, this.cursor !== null && read ? hms(read.t) : "now");
    series.forEach((s, i) => say(this.values[i], read ? this.o.text(read[s.key]) : "–"));
    this.sum(known, max);
    if (this.table.open && this.cursor === null) this.fillTable();
  }

  /** The points of a series, cut where nothing is known: no line is drawn over a gap. */
  runs(key) {
    const runs = [];
    let run = null, before = null;
    for (const p of this.points) {
      if (p[key] === null || p[key] === undefined) { run = null; continue; }
      if (run === null || p.t - before > this.step * 3000) runs.push(run = []);
      run.push(p);
      before = p.t;
    }
    return runs;
  }

  timeTicks(from, last, px, height, plotWidth) {
    const every = [60, 120, 180, 300, 600, 900].find((s) => (this.span / s) * 62 <= plotWidth) ?? 1800;
    const parts = [];
    for (let t = Math.ceil(from / (every * 1000)) * every * 1000; t <= last; t += every * 1000) {
      if (px(t) < LEFT + plotWidth - 14) parts.push(svg("text", { class: "tick", x: px(t), y: height - 6, "text-anchor": "middle" }, hm(t)));
    }
    return parts;
  }

  sum(known, max) {
    const read = this.points.at(-1);
    const now = read ? this.o.series.map((s) => `${s.label} ${this.o.text(read[s.key])}`).join(", ") : "nothing yet";
    const text = visible(`Now ${now}. Highest in ${Math.round(this.span / 60)} minutes: ${known.length ? this.o.text(max) : "none"}.`);
    if (this.summary.textContent !== text) this.summary.textContent = text;
  }

  fillTable() {
    if (!this.table.open) return;
    const minutes = new Map();
    for (const p of this.points) {
      const minute = Math.floor(p.t / 60000) * 60000;
      if (!minutes.has(minute)) minutes.set(minute, []);
      minutes.get(minute).push(p);
    }
    this.body.replaceChildren(...[...minutes].reverse().map(([minute, points]) => el("tr", {},
      el("th", { scope: "row" }, hm(minute)),
      this.o.series.map((s) => {
        const all = points.map((p) => p[s.key]).filter((v) => v !== null && v !== undefined);
        const value = !all.length ? null : this.o.log ? Math.max(...all) : all.reduce((a, b) => a + b, 0) / all.length;
        return el("td", { class: "num" }, this.o.text(value));
      }))));
  }
}
