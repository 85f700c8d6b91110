// Charts, each with the same values as a table.

import { h, isNumber, number, show, svg } from "./dom.js";
import { colour, onTheme } from "./theme.js";
import uPlot from "./vendor/uplot.js";

const WIDTH = 520;
const HEIGHT = 190;
const LEFT = 38;
const BOTTOM = 20;

/** Histogram of toxicity before and after training. */
export function histogramPanel(toxicity) {
  const panel = h("div", { class: "panel" }, h("h2", {}, "Toxicity of responses"));
  const counts = toxicity?.histogram;
  if (!counts) {
    panel.append(h("p", {}, "This run has no stored histogram."));
    return panel;
  }
  panel.append(
    h("p", { class: "legend" }, h("span", { class: "key before" }), "before", h("span", { class: "key after" }), "after", h("span", { class: "aside" }, "bar height: square root of count")),
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
  const maxCount = Math.max(1, ...before, ...after);
  // Most responses are near 0 or 1; the square root keeps the few others visible.
  const barHeight = (value) => (HEIGHT - BOTTOM - 8) * Math.sqrt(value / maxCount);
  const step = (WIDTH - LEFT) / before.length;
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "histogram", role: "img", "aria-label": "Histogram of toxicity before and after training; the table below has the counts" });
  for (const value of new Set([0, 1 / 16, 1 / 4, 9 / 16, 1].map((share) => roundDown(share * maxCount)))) {
    const y = HEIGHT - BOTTOM - barHeight(value);
    chart.append(svg("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "grid" }));
    chart.append(svg("text", { x: LEFT - 6, y: y + 4, class: "tick end" }, String(value)));
  }
  const bar = (i, value, side, offset) => {
    const x = LEFT + i * step + 1.5 + offset;
    const rect = svg("rect", { x, y: HEIGHT - BOTTOM - barHeight(value), width: step / 2 - 2, height: barHeight(value), class: side, rx: 1 });
    rect.append(svg("title", {}, `${value} responses ${side} training, toxicity ${number(edges[i], 2)} to ${number(edges[i + 1], 2)}`));
    chart.append(rect);
  };
  before.forEach((value, i) => bar(i, value, "before", 0));
  after.forEach((value, i) => bar(i, value, "after", step / 2 - 1));
  for (const edge of [0, 0.25, 0.5, 0.75, 1]) {
    const anchor = edge === 0 ? "start" : edge === 1 ? "end" : "middle";
    chart.append(svg("text", { x: LEFT + edge * (WIDTH - LEFT), y: HEIGHT - 4, class: `tick ${anchor}` }, String(edge)));
  }
  return chart;
}

/** Round down to one significant digit. */
function roundDown(value) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return Math.floor(value / unit) * unit;
}

const SERIES = [
  ["Reward score", [["score", "score"]]],
  ["Toxicity of sampled responses", [["toxicity", "toxicity"]]],
  ["KL from reference, nats", [["kl", "KL"]]],
  ["Entropy, nats per token", [["entropy", "entropy"]]],
  ["Response length, tokens", [["length", "length"]]],
  ["Time per phase, s", [["seconds_sample", "sample"], ["seconds_score", "score"], ["seconds_reference", "reference"], ["seconds_update", "update"]]],
];
// Metrics in the table that have no chart.
const TABLE_ONLY = [["finished", "finished"], ["explained_variance", "explained variance"]];
const COLOURS = ["a", "b", "c", "d"];

/** Training metrics by step; redrawn when the theme or the width changes. */
export function historyPanel(panel, steps, signal) {
  const given = SERIES.filter(([, keys]) => steps.some((step) => isNumber(step[keys[0][0]])));
  if (given.length === 0) {
    show(panel, h("h2", {}, "Training"), h("p", {}, "This run has no stored training history."));
    return;
  }
  const container = h("div", { class: "charts" });
  const others = TABLE_ONLY.filter(([key]) => steps.some((step) => isNumber(step[key])));
  const columns = [...given.flatMap(([, lines]) => lines.map(([key, name]) => [key, key.startsWith("seconds_") ? `${name}, s` : name])), ...others];
  show(
    panel,
    h("h2", {}, "Training metrics by step"),
    container,
    table("Steps as a table", ["step", ...columns.map(([, name]) => name)], steps.map((step) => [String(step.step), ...columns.map(([key]) => number(step[key]))])),
  );
  const charted = given.map(([title, lines]) => {
    const legend = lines.length < 2 ? null : h("span", { class: "legend" }, lines.map(([, name], i) => [h("span", { class: `key line-${COLOURS[i]}` }), name]));
    const canvas = h("div", { class: "canvas", role: "img", "aria-label": `${title} by step; the table below has the values` });
    container.append(h("figure", {}, h("figcaption", {}, title, legend), canvas));
    return { lines, canvas, plot: null };
  });
  const draw = () => {
    for (const chart of charted) {
      chart.plot?.destroy();
      chart.plot = line(chart, steps);
    }
  };
  draw();
  onTheme(draw, signal);
  const resizes = new ResizeObserver(() => {
    for (const { plot, canvas } of charted) if (plot && plot.width !== canvas.clientWidth && canvas.clientWidth) plot.setSize({ width: canvas.clientWidth, height: 130 });
  });
  resizes.observe(container);
  signal.addEventListener("abort", () => {
    resizes.disconnect();
    for (const { plot } of charted) plot?.destroy();
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

function table(name, columns, rows) {
  return h(
    "details",
    {},
    h("summary", {}, name),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": name },
      h("table", {}, h("thead", {}, h("tr", {}, columns.map((column) => h("th", { scope: "col" }, column)))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, cell)))))),
    ),
  );
}
