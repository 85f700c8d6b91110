// One run: its overview, then its samples.

import { count, h, isNumber, mean, moment, number, percent, show, signed, visible } from "./dom.js";
import { curvesPanel, histogramPanel } from "./charts.js";
import { showComparison } from "./compare.js";
import { kind } from "./runs.js";
import { showSamples } from "./samples.js";

export async function showRun(view, id) {
  const { main, source, signal, parameters, fail } = view;
  const report = await source.run(id, signal);
  document.title = `${report.run_id} · ray-detox`;
  const beside = h("div", {});
  const curves = h("div", { class: "panel" }, h("h2", {}, "Training"), h("p", { class: "loading" }, "Loading…"));
  const samples = h("section", { id: "samples", "aria-label": "Samples" });
  show(
    main,
    heading(report),
    verdict(report),
    headline(report),
    h("div", { class: "panels" }, histogramPanel(report.toxicity), quality(report)),
    curves,
    notes(report),
    settings(report),
    beside,
    samples,
  );
  // Neither waits for the other, and neither can take the other down.
  const loadCurves = async () => {
    try {
      curvesPanel(curves, await source.curves(id, signal), signal);
    } catch (error) {
      if (!signal.aborted) show(curves, h("h2", {}, "Training"), fail(error, loadCurves));
    }
  };
  await Promise.all([loadCurves(), together(view, report, beside, samples)]);
  if (parameters.has("sample")) samples.querySelector(".sample")?.focus();
}

async function together(view, report, beside, samples) {
  const other = view.source.standalone ? null : await showComparison(view, report, beside);
  await showSamples(view, report, other, samples);
}

function heading(report) {
  const about = [report.recipe, moment(report.created), `${count(report.n)} prompts`, isNumber(report.steps) ? `${count(report.steps)} steps` : null];
  return h("div", { class: "heading" }, h("h1", {}, report.run_id), h("p", {}, about.filter(Boolean).join(" · ")));
}

const SIGNS = { good: "▼", warning: "!", bad: "▲", neutral: "≈" };

function verdict({ verdict: given, status }) {
  const name = given?.name ?? status ?? "no verdict";
  const words = given?.sentence ?? "";
  const reasons = (given?.reasons ?? []).filter((reason) => !words.includes(reason));
  return h(
    "section",
    { class: `verdict ${kind(name)}`, "aria-label": "Verdict" },
    h("span", { class: "sign", "aria-hidden": "true" }, SIGNS[kind(name)]),
    h(
      "div",
      {},
      h("h2", {}, name.charAt(0).toUpperCase() + name.slice(1)),
      h("p", {}, visible(words)),
      reasons.length ? h("ul", {}, reasons.map((reason) => h("li", {}, visible(reason)))) : null,
    ),
  );
}

function headline({ toxicity = {}, n, kl }) {
  const { delta = {}, before = {}, after = {} } = toxicity ?? {};
  const interval = (low, high, words) => (isNumber(low) && isNumber(high) ? `95% interval ${words(low)} to ${words(high)}`.replaceAll(" ", "\u00a0") : "no interval");
  return h(
    "dl",
    { class: "figures" },
    figure("Mean toxicity", `${number(mean(before))} → ${number(mean(after))}`, `change ${signed(delta.mean)}, ${interval(delta.low, delta.high, signed)}`),
    figure("Toxicity gone", percent(toxicity?.improvement), interval(toxicity?.improvement_low, toxicity?.improvement_high, percent)),
    figure(`Answers above ${number(toxicity?.toxic_above ?? 0.5, 2)}`, `${percent(before.share)} → ${percent(after.share)}`, `of ${count(toxicity?.scored ?? n)} scored prompts`),
    figure("Drift from the start", isNumber(mean(kl)) ? `${number(mean(kl), 2)} nats` : number(null), "KL to the reference, per answer"),
    standing(toxicity ?? {}),
  );
}

function figure(name, value, about) {
  return h("div", { class: "figure" }, h("dt", {}, name), h("dd", {}, h("strong", {}, value), h("span", {}, about)));
}

/** How many prompts fared better, worse or the same: a bar, and the numbers in words. */
function standing(toxicity) {
  const counts = ["better", "same", "worse", "unscored"].map((name) => [name, toxicity[name] ?? 0]);
  const total = counts.reduce((sum, [, value]) => sum + value, 0);
  const bar = h("span", { class: "standing", "aria-hidden": "true" });
  for (const [name, value] of counts) {
    const part = h("span", { class: `part ${name}` });
    part.style.setProperty("flex-grow", String(value));
    if (value) bar.append(part);
  }
  const p = isNumber(toxicity.p_value) ? ` · p ${toxicity.p_value < 0.001 ? "< 0.001" : `= ${number(toxicity.p_value)}`}` : "";
  const effect = isNumber(toxicity.effect_size) ? ` · effect size ${signed(toxicity.effect_size, 2)}` : "";
  return h(
    "div",
    { class: "figure wide" },
    h("dt", {}, `Of ${count(total)} prompts`),
    h("dd", {}, bar, h("span", { class: "counts" }, counts.map(([name, value]) => h("span", { class: `count ${name}` }, `${count(value)} ${name}`)), h("span", {}, `${p}${effect}`.replace(/^ · /, "")))),
  );
}

const QUALITIES = [
  ["Reward", "reward", (value) => number(value)],
  ["ROUGE-L to the reference", "rouge_l", (value) => number(value)],
  ["Facts kept", "facts", (value) => percent(value)],
  ["Length, tokens", "length", (value) => number(value, 1)],
  ["Distinct bigrams", "distinct_2", (value) => percent(value)],
  ["Unique answers", "unique_share", (value) => percent(value)],
  ["Cut for the classifier", "truncated", (value) => count(value)],
];

function quality(report) {
  const rows = QUALITIES.map(([name, key, words]) => [name, mean(report[key]?.before), mean(report[key]?.after), words]);
  const judge = report.judge;
  if (judge) rows.push([`Independent judge: toxicity (${signed(judge.delta?.mean)})`, mean(judge.before), mean(judge.after), (value) => number(value)]);
  return h(
    "div",
    { class: "panel" },
    h("h2", {}, "Was quality kept?"),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, "before"), h("th", { scope: "col" }, "after"))),
      h(
        "tbody",
        {},
        rows
          .filter(([, before, after]) => isNumber(before) || isNumber(after))
          .map(([name, before, after, words]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, words(before)), h("td", {}, words(after)))),
      ),
    ),
  );
}

function notes({ notes: given }) {
  const sentences = typeof given === "string" ? [given] : (given ?? []);
  if (sentences.length === 0) return null;
  return h("section", { class: "notes" }, h("h2", {}, "To be read with care"), h("ul", {}, sentences.map((sentence) => h("li", {}, visible(sentence)))));
}

/** Everything that decides a result, as names and values. */
function settings(report) {
  const rows = [...flat(report.config ?? {}, ""), ...flat(report.versions ?? {}, "version of "), ...flat(report.fingerprints ?? {}, "fingerprint of "), ...flat(report.seconds ?? {}, "seconds of ")];
  return h(
    "details",
    { class: "settings" },
    h("summary", {}, "Settings, versions and fingerprints"),
    h("dl", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, visible(name)), h("dd", {}, visible(typeof value === "string" && !value.includes("\n") ? value : JSON.stringify(value)))))),
  );
}

function flat(tree, prefix) {
  return Object.entries(tree).flatMap(([name, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${name}.`) : [[prefix + name, value]],
  );
}
