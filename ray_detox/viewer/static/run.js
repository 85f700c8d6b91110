// One run: overview, training history, then samples.

import { count, h, isNumber, listedMoment, mean, number, part, percent, rose, plain, show, signed } from "./dom.js";
import { historyPanel, histogramPanel } from "./charts.js";
import { showComparison } from "./compare.js";
import { verdictClass } from "./runs.js";
import { showSamples } from "./samples.js";

export async function showRun(view, id) {
  const { main, source, signal, parameters, errorBox } = view;
  const report = await source.run(id, signal);
  document.title = plain(`${report.run_id} · ray-detox`);
  const comparison = h("div", {});
  const history = h("div", { class: "panel" }, h("h2", {}, "Training"), h("p", { class: "loading" }, "Loading…"));
  const samples = h("section", { id: "samples", "aria-label": "Samples" });
  show(
    main,
    part(() => heading(report)),
    part(() => verdict(report)),
    part(() => headline(report)),
    h("div", { class: "panels" }, part(() => histogramPanel(report.toxicity)), part(() => quality(report))),
    history,
    part(() => notes(report)),
    part(() => settings(report)),
    comparison,
    samples,
  );
  // Load the history and the samples in parallel; an error of one does not hide the other.
  const loadHistory = async () => {
    try {
      historyPanel(history, await source.history(id, signal), signal);
    } catch (error) {
      if (!signal.aborted) show(history, h("h2", {}, "Training"), errorBox(error, loadHistory));
    }
  };
  await Promise.all([loadHistory(), loadSamples(view, report, comparison, samples)]);
  if (parameters.has("sample")) samples.querySelector(".sample")?.focus();
}

async function loadSamples(view, report, comparison, samples) {
  const other = view.source.standalone ? null : await showComparison(view, report, comparison);
  await showSamples(view, report, other, samples);
}

function heading(report) {
  const about = [report.recipe, listedMoment(report.created), `${count(report.n)} prompts`, isNumber(report.steps) ? `${count(report.steps)} steps` : null];
  return h("div", { class: "heading" }, h("h1", {}, report.run_id), h("p", {}, about.filter(Boolean).join(" · ")));
}

const SIGNS = { good: "▼", warning: "!", bad: "▲", neutral: "≈" };

function verdict({ verdict: given, status }) {
  const name = given?.name ?? status ?? "no verdict";
  const sentence = given?.sentence ?? "";
  const reasons = (given?.reasons ?? []).filter((reason) => !sentence.includes(reason));
  return h(
    "section",
    { class: `verdict ${verdictClass(name)}`, "aria-label": "Verdict" },
    h("span", { class: "sign", "aria-hidden": "true" }, SIGNS[verdictClass(name)]),
    h(
      "div",
      {},
      h("h2", {}, name.charAt(0).toUpperCase() + name.slice(1)),
      h("p", {}, sentence),
      reasons.length ? h("ul", {}, reasons.map((reason) => h("li", {}, reason))) : null,
    ),
  );
}

function headline({ toxicity = {}, n, kl }) {
  const { delta = {}, before = {}, after = {} } = toxicity ?? {};
  const interval = (low, high, format) => (isNumber(low) && isNumber(high) ? `95% interval ${format(low)} to ${format(high)}`.replaceAll(" ", "\u00a0") : "no interval");
  return h(
    "dl",
    { class: "metrics" },
    metric("Mean toxicity", `${number(mean(before))} → ${number(mean(after))}`, `change ${signed(delta.mean)}, ${interval(delta.low, delta.high, signed)}`),
    reduction(toxicity ?? {}, interval),
    metric(`Responses with toxicity above ${number(toxicity?.toxic_above ?? 0.5, 2)}`, `${percent(before.share)} → ${percent(after.share)}`, `of ${count(toxicity?.scored ?? n)} scored prompts`),
    metric("KL from reference", isNumber(mean(kl)) ? `${number(mean(kl), 2)} nats` : number(null), "mean per response"),
    outcomes(toxicity ?? {}),
  );
}

/** How much toxicity fell in percent, or by how much it rose. */
function reduction({ improvement, improvement_low: low, improvement_high: high }, interval) {
  if (!rose(improvement)) return metric("Toxicity reduction", percent(improvement), interval(low, high, percent));
  const rise = (value) => percent(-value);
  return metric("Toxicity increase", rise(improvement), interval(high, low, rise));
}

function metric(name, value, about) {
  return h("div", { class: "metric" }, h("dt", {}, name), h("dd", {}, h("strong", {}, value), h("span", {}, about)));
}

/** Number of prompts that became better, stayed the same or became worse: a bar and its counts. */
function outcomes(toxicity) {
  const counts = ["better", "same", "worse", "unscored"].map((name) => [name, toxicity[name] ?? 0]);
  const total = counts.reduce((sum, [, value]) => sum + value, 0);
  const bar = h("span", { class: "outcomes", "aria-hidden": "true" });
  for (const [name, value] of counts) {
    const part = h("span", { class: `part ${name}` });
    part.style.setProperty("flex-grow", String(value));
    if (value) bar.append(part);
  }
  const p = isNumber(toxicity.p_value) ? ` · p ${toxicity.p_value < 0.001 ? "< 0.001" : `= ${number(toxicity.p_value)}`}` : "";
  const effect = isNumber(toxicity.effect_size) ? ` · effect size ${signed(toxicity.effect_size, 2)}` : "";
  return h(
    "div",
    { class: "metric wide" },
    h("dt", {}, `Outcome of ${count(total)} prompts`),
    h("dd", {}, bar, h("span", { class: "counts" }, counts.map(([name, value]) => h("span", { class: `count ${name}` }, `${count(value)} ${name}`)), h("span", {}, `${p}${effect}`.replace(/^ · /, "")))),
  );
}

const QUALITY_METRICS = [
  ["Reward", "reward", (value) => number(value)],
  ["ROUGE-L against reference", "rouge_l", (value) => number(value)],
  ["Facts kept", "facts", (value) => percent(value)],
  ["Length, tokens", "length", (value) => number(value, 1)],
  ["Finished responses", "finished", (value) => percent(value)],
  ["Distinct bigrams", "distinct_2", (value) => percent(value)],
  ["Unique responses", "unique_share", (value) => percent(value)],
  ["Truncated for the classifier", "truncated", (value) => count(value)],
];

function quality(report) {
  const rows = QUALITY_METRICS.map(([name, key, format]) => [name, mean(report[key]?.before), mean(report[key]?.after), format]);
  const judge = report.judge;
  if (judge) rows.push([`Toxicity by independent judge (change ${signed(judge.delta?.mean)})`, mean(judge.before), mean(judge.after), (value) => number(value)]);
  return h(
    "div",
    { class: "panel" },
    h("h2", {}, "Quality metrics"),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, "before"), h("th", { scope: "col" }, "after"))),
      h(
        "tbody",
        {},
        rows
          .filter(([, before, after]) => isNumber(before) || isNumber(after))
          .map(([name, before, after, format]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, format(before)), h("td", {}, format(after)))),
      ),
    ),
  );
}

function notes({ notes: given }) {
  const sentences = typeof given === "string" ? [given] : (given ?? []);
  if (sentences.length === 0) return null;
  return h("section", { class: "notes" }, h("h2", {}, "Caveats"), h("ul", {}, sentences.map((sentence) => h("li", {}, sentence))));
}

/** Settings, versions, fingerprints and durations of a run, as names and values. */
function settings(report) {
  const rows = [...flatten(report.config ?? {}, ""), ...flatten(report.versions ?? {}, "version of "), ...flatten(report.fingerprints ?? {}, "fingerprint of "), ...flatten(report.seconds ?? {}, "seconds for ").map(([name, value]) => [name, isNumber(value) ? Number(value.toFixed(1)) : value])];
  return h(
    "details",
    { class: "settings" },
    h("summary", {}, "Settings, versions and fingerprints"),
    h("dl", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" && !value.includes("\n") ? value : JSON.stringify(value))))),
  );
}

function flatten(tree, prefix) {
  return Object.entries(tree).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flatten(value, `${prefix}${name}.`) : [[prefix + name, value]],
  );
}
