// Pictures of figures, each with the same figures as a table.

import { h, isNumber, number, show, svg } from "./dom.js";
import { colour, onTheme } from "./theme.js";
import uPlot from "./vendor/uplot.js";

const WIDTH = 520;
const HEIGHT = 190;
const LEFT = 38;
const BOTTOM = 20;

/** Toxicity before and after, counted in equal steps. */
export function histogramPanel(toxicity) {
  const panel = h("div", { class: "panel" }, h("h2", {}, "How toxic the answers are"));
  const counts = toxicity?.histogram;
  if (!counts) {
    panel.append(h("p", {}, "This run was stored without counts."));
    return panel;
  }
  panel.append(
    h("p", { class: "legend" }, h("span", { class: "key before" }), "before", h("span", { class: "key after" }), "after", h("span", { class: "aside" }, "height: square root of the count")),
    histogram(counts),
    table(
      "Counts as a table",
      ["toxicity", "before", "after"],
      counts.before.map((before, i) => [`${number(counts.edges[i], 2)} to ${number(counts.edges[i + 1], 2)}`, String(before), String(counts.after[i])]),
    ),
  );
  return panel;
}

function histogram({ edges, before, after }) {
  const most = Math.max(1, ...before, ...after);
  // Most answers lie at the ends; a root shows the few between them, too.
  const high = (value) => (HEIGHT - BOTTOM - 8) * Math.sqrt(value / most);
  const step = (WIDTH - LEFT) / before.length;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "histogram", role: "img", "aria-label": "Histogram of toxicity before and after; its counts are in the table below" });
  for (const value of new Set([0, 1 / 16, 1 / 4, 9 / 16, 1].map((share) => round(share * most)))) {
    const y = HEIGHT - BOTTOM - high(value);
    picture.append(svg("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "grid" }));
    picture.append(svg("text", { x: LEFT - 6, y: y + 4, class: "tick end" }, String(value)));
  }
  const bar = (i, value, side, offset) => {
    const x = LEFT + i * step + 1.5 + offset;
    const rect = svg("rect", { x, y: HEIGHT - BOTTOM - high(value), width: step / 2 - 2, height: high(value), class: side, rx: 1 });
    rect.append(svg("title", {}, `${value} ${side}, toxicity ${number(edges[i], 2)} to ${number(edges[i + 1], 2)}`));
    picture.append(rect);
  };
  before.forEach((value, i) => bar(i, value, "before", 0));
  after.forEach((value, i) => bar(i, value, "after", step / 2 - 1));
  for (const edge of [0, 0.25, 0.5, 0.75, 1]) {
    const anchor = edge === 0 ? "start" : edge === 1 ? "end" : "middle";
    picture.append(svg("text", { x: LEFT + edge * (WIDTH - LEFT), y: HEIGHT - 4, class: `tick ${anchor}` }, String(edge)));
  }
  return picture;
}

/** The greatest number of one digit and zeros that is no greater. */
function round(value) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return Math.floor(value / unit) * unit;
}

const SERIES = [
  ["Score", [["score", "score"]]],
  ["Toxicity while sampling", [["toxicity", "toxicity"]]],
  ["KL to the reference, nats", [["kl", "KL"]]],
  ["Entropy, nats per token", [["entropy", "entropy"]]],
  ["Length, tokens", [["length", "length"]]],
  ["Seconds by phase", [["seconds_sample", "sample"], ["seconds_score", "score"], ["seconds_reference", "reference"], ["seconds_update", "update"]]],
];
const COLOURS = ["a", "b", "c", "d"];

/** How training went, step by step; drawn again when the colours or the width change. */
export function curvesPanel(panel, steps, signal) {
  const given = SERIES.filter(([, keys]) => steps.some((step) => isNumber(step[keys[0][0]])));
  if (given.length === 0) {
    show(panel, h("h2", {}, "Training"), h("p", {}, "This run was stored without its training curves."));
    return;
  }
  const charts = h("div", { class: "charts" });
  const keys = given.flatMap(([, some]) => some.map(([key]) => key));
  show(
    panel,
    h("h2", {}, "Training, step by step"),
    charts,
    table("Steps as a table", ["step", ...keys.map((key) => key.replace(/^(seconds)_(.*)/, "$2, s"))], steps.map((step) => [String(step.step), ...keys.map((key) => number(step[key]))])),
  );
  const boxes = given.map(([title, lines]) => {
    const legend = lines.length < 2 ? null : h("span", { class: "legend" }, lines.map(([, name], i) => [h("span", { class: `key line-${COLOURS[i]}` }), name]));
    const canvas = h("div", { class: "canvas", role: "img", "aria-label": `${title} by step; the figures are in the table below` });
    charts.append(h("figure", {}, h("figcaption", {}, title, legend), canvas));
    return { lines, canvas, plot: null };
  });
  const draw = () => {
    for (const box of boxes) {
      box.plot?.destroy();
      box.plot = line(box, steps);
    }
  };
  draw();
  onTheme(draw, signal);
  const watch = new ResizeObserver(() => {
    for (const { plot, canvas } of boxes) if (plot && plot.width !== canvas.clientWidth && canvas.clientWidth) plot.setSize({ width: canvas.clientWidth, height: 130 });
  });
  watch.observe(charts);
  signal.addEventListener("abort", () => {
    watch.disconnect();
    for (const { plot } of boxes) plot?.destroy();
  });
}

function line({ lines, canvas }, steps) {
  const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const options = {
    width: canvas.clientWidth || 300,
    height: 130,
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false } },
    axes: [{ ...axis, size: 22 }, { ...axis, size: 42 }],
    series: [{}, ...lines.map(([, name], i) => ({ label: name, stroke: colour(`line-${COLOURS[i]}`), width: 1.75, points: { show: steps.length < 2 } }))],
  };
  const column = (key) => steps.map((step) => (isNumber(step[key]) ? step[key] : null));
  return new uPlot(options, [column("step"), ...lines.map(([key]) => column(key))], canvas);
}

function table(name, heads, rows) {
  return h(
    "details",
    {},
    h("summary", {}, name),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": name },
      h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, cell)))))),
    ),
  );
}
