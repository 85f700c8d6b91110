// Comparison of two runs: a selector for the other run and a table with the metrics of both.

import { count, h, mean, number, percent, show } from "./dom.js";

/** Show a selector for another run; returns its report, or null if none is selected. */
export async function showComparison({ source, signal, parameters, errorBox }, report, section) {
  const { runs } = await source.runs(undefined, signal);
  const chosen = parameters.get("with");
  const others = runs.map((run) => run.run_id).filter((id) => id !== report.run_id);
  // A link may name a run that is not on the first page of runs.
  if (chosen && chosen !== report.run_id && !others.includes(chosen)) others.push(chosen);
  if (others.length === 0) return null;
  const choice = h(
    "select",
    { onchange: (event) => openComparison(report.run_id, event.target.value) },
    h("option", { value: "" }, "none"),
    others.map((id) => h("option", { value: id, selected: id === chosen }, id)),
  );
  const metrics = h("div", {});
  show(section, h("div", { class: "tools" }, h("label", {}, h("span", {}, "Compare with"), choice)), metrics);
  if (!chosen || chosen === report.run_id) return null;
  try {
    const other = await source.run(chosen, signal);
    show(metrics, table(report, other));
    return other;
  } catch (error) {
    if (signal.aborted) throw error;
    show(metrics, errorBox(error, () => location.reload()));
    return null;
  }
}

function openComparison(run, other) {
  location.hash = `#/run/${encodeURIComponent(run)}${other ? `?with=${encodeURIComponent(other)}` : ""}`;
}

const METRICS = [
  ["prompts", (run) => count(run.n)],
  ["toxicity before", (run) => number(mean(run.toxicity?.before))],
  ["toxicity after", (run) => number(mean(run.toxicity?.after))],
  ["toxicity reduction", (run) => percent(run.toxicity?.improvement)],
  ["prompts better / worse", (run) => `${count(run.toxicity?.better)} / ${count(run.toxicity?.worse)}`],
  ["reward after", (run) => number(mean(run.reward?.after), 2)],
  ["ROUGE-L after", (run) => number(mean(run.rouge_l?.after))],
  ["length after", (run) => number(mean(run.length?.after), 1)],
  ["KL from reference, nats", (run) => number(mean(run.kl), 2)],
  ["verdict", (run) => String(run.verdict?.name ?? "")],
];

function table(one, two) {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparison of two runs" },
    h(
      "table",
      { class: "two" },
      h("thead", {}, h("tr", {}, h("td", {}), [one, two].map((run) => h("th", { scope: "col" }, run.run_id)))),
      h("tbody", {}, METRICS.map(([name, format]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, format(one)), h("td", {}, format(two))))),
    ),
  );
}
