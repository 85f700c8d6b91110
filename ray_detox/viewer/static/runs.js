// The list of runs, newest first; those whose clock was ahead are last.

import { announce, count, h, listedMoment, mean, number, part, percent, rose, show } from "./dom.js";

export async function showRuns({ main, source, signal, errorBox }) {
  document.title = "Runs · ray-detox";
  const first = await source.runs(undefined, signal);
  const heading = h("h1", {}, "Runs");
  if (first.runs.length === 0) {
    show(main, heading, h("div", { class: "empty" }, h("p", {}, "There are no runs yet."), h("p", {}, "Start one with ", h("code", {}, "ray-detox run"), ", then reload this page.")));
    return;
  }
  const list = h("ol", { class: "runs" });
  const more = h("div", { class: "more" });
  show(main, heading, list, more);
  add(first);

  function add(page) {
    list.append(...page.runs.map((run) => h("li", {}, part(() => row(run)))));
    show(more, page.next ? h("button", { type: "button", onclick: () => load(page.next) }, "More runs") : null);
  }

  async function load(cursor) {
    show(more, h("p", { class: "loading" }, "Loading…"));
    try {
      add(await source.runs(cursor, signal));
      announce(`${list.children.length} runs shown`);
    } catch (error) {
      if (!signal.aborted) show(more, errorBox(error, () => load(cursor)));
    }
  }
}

function row(run) {
  const toxicity = run.toxicity ?? {};
  const sign = rose(toxicity.improvement) ? -1 : 1;
  const verdict = run.verdict?.name ?? run.status ?? "";
  return h(
    "a",
    { class: "run", href: `#/run/${encodeURIComponent(run.run_id)}` },
    h("span", { class: "run-name" }, run.run_id),
    h("span", { class: "run-about" }, `${run.recipe} · ${listedMoment(run.created)} · ${count(run.n)} prompts`),
    h("span", { class: "run-metric" }, `${number(mean(toxicity.before))} → ${number(mean(toxicity.after))}`, h("small", {}, "toxicity")),
    h("span", { class: "run-metric" }, percent(sign * toxicity.improvement), h("small", {}, sign < 0 ? "increase" : "reduction")),
    h("span", { class: `badge ${verdictClass(verdict)}` }, verdict),
  );
}

/** The CSS class that sets the colour of a verdict. */
export function verdictClass(verdict) {
  return { improved: "good", "quality lost": "warning", worse: "bad" }[verdict] ?? "neutral";
}
