// Two runs beside each other: which one to compare with, and the figures of both.

import { count, h, mean, number, percent, show } from "./dom.js";

/** Show the choice of another run; returns its report, or null where none is chosen. */
export async function showComparison({ source, signal, parameters, fail }, report, section) {
  const { runs } = await source.runs(undefined, signal);
  const chosen = parameters.get("with");
  const others = runs.map((run) => run.run_id).filter((id) => id !== report.run_id);
  // A link may name a run that is not among the newest.
  if (chosen && chosen !== report.run_id && !others.includes(chosen)) others.push(chosen);
  if (others.length === 0) return null;
  const choice = h(
    "select",
    { onchange: (event) => go(report.run_id, event.target.value) },
    h("option", { value: "" }, "no other run"),
    others.map((id) => h("option", { value: id, selected: id === chosen }, id)),
  );
  const figures = h("div", {});
  show(section, h("div", { class: "tools" }, h("label", {}, h("span", {}, "Compare with"), choice)), figures);
  if (!chosen || chosen === report.run_id) return null;
  try {
    const other = await source.run(chosen, signal);
    show(figures, table(report, other));
    return other;
  } catch (error) {
    if (signal.aborted) throw error;
    show(figures, fail(error, () => location.reload()));
    return null;
  }
}

function go(run, other) {
  location.hash = `#/run/${encodeURIComponent(run)}${other ? `?with=${encodeURIComponent(other)}` : ""}`;
}

const FIGURES = [
  ["prompts", (run) => count(run.n)],
  ["toxicity before", (run) => number(mean(run.toxicity?.before))],
  ["toxicity after", (run) => number(mean(run.toxicity?.after))],
  ["toxicity gone", (run) => percent(run.toxicity?.improvement)],
  ["better / worse", (run) => `${count(run.toxicity?.better)} / ${count(run.toxicity?.worse)}`],
  ["reward after", (run) => number(mean(run.reward?.after), 2)],
  ["ROUGE-L after", (run) => number(mean(run.rouge_l?.after))],
  ["length after", (run) => number(mean(run.length?.after), 1)],
  ["KL, nats", (run) => number(mean(run.kl), 2)],
  ["verdict", (run) => String(run.verdict?.name ?? "")],
];

function table(one, two) {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Two runs" },
    h(
      "table",
      { class: "two" },
      h("thead", {}, h("tr", {}, h("td", {}), [one, two].map((run) => h("th", { scope: "col" }, run.run_id)))),
      h("tbody", {}, FIGURES.map(([name, words]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, words(one)), h("td", {}, words(two))))),
    ),
  );
}
