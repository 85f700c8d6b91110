// The samples of a run: filters, search and export, and a list that loads page by page.

import { announce, count, h, show } from "./dom.js";
import { exportButtons } from "./export.js";
import { sampleCard } from "./sample.js";

const PER_PAGE = 25;
// A page of a search may be empty and still have a next one; read this many before asking the reader.
const MAX_EMPTY_PAGES = 3;

const SORTS = [
  ["toxicity desc", "toxicity: worst change first"],
  ["toxicity asc", "toxicity: best change first"],
  ["reward asc", "reward: worst change first"],
  ["reward desc", "reward: best change first"],
  ["index asc", "original order"],
];
const SHOWS = [
  ["all", "all"],
  ["worse", "worse only"],
  ["better", "better only"],
  ["same", "unchanged"],
  ["toxic_before", "toxic before"],
  ["toxic_after", "toxic after"],
  ["unscored", "not scored"],
];

/** Show the samples that the address selects; `other` is the run to compare with, or null. */
export async function showSamples(view, report, other, section) {
  const { parameters } = view;
  const index = parameters.get("sample");
  if (index !== null && /^[0-9]{1,8}$/.test(index)) await showOne(view, report, other, section, Number(index));
  else await showList(view, report, other, section);
}

async function showOne(view, report, other, section, index) {
  const { source, signal, parameters, errorBox } = view;
  const back = new URLSearchParams(parameters);
  back.delete("sample");
  const heading = [h("h2", {}, `Sample ${index}`), h("p", {}, h("a", { href: `#/run/${encodeURIComponent(report.run_id)}?${back}` }, "All samples of this run"))];
  try {
    const sample = await source.sample(report.run_id, index, signal);
    show(section, heading, await cards(view, report, other, [sample], true));
  } catch (error) {
    if (!signal.aborted) show(section, heading, errorBox(error, () => showOne(view, report, other, section, index)));
  }
}

async function showList(view, report, other, section) {
  const { signal, parameters } = view;
  const choiceOf = (name, choices) => (choices.some(([value]) => value === parameters.get(name)) ? parameters.get(name) : choices[0][0]);
  const state = { sort: choiceOf("sort", SORTS), show: choiceOf("show", SHOWS), q: (parameters.get("q") ?? "").slice(0, 200) };
  const list = h("div", { class: "samples" });
  const more = h("div", { class: "more" });
  const status = h("p", { class: "status", role: "status" });
  const revealButton = h("button", { type: "button", "aria-pressed": "false", onclick: () => toggleAll(revealButton, list) }, "Show all toxic text");
  let latest = new AbortController();

  const selector = (title, name, choices) =>
    h("label", {}, h("span", {}, title), h("select", { name, onchange: (event) => change({ [name]: event.target.value }) }, choices.map(([value, label]) => h("option", { value, selected: value === state[name] }, label))));
  let timer = 0;
  const search = h("input", {
    type: "search",
    value: state.q,
    maxlength: "200",
    placeholder: "prompts and responses",
    autocomplete: "off",
    oninput: () => {
      clearTimeout(timer);
      timer = setTimeout(() => change({ q: search.value }), 250);
    },
  });
  show(
    section,
    h("h2", {}, "Samples before and after training"),
    h(
      "div",
      { class: "tools", role: "search" },
      selector("Sort by", "sort", SORTS),
      selector("Show", "show", SHOWS),
      h("label", { class: "grow" }, h("span", {}, "Search"), search),
      revealButton,
      exportButtons(view, report, () => query()),
    ),
    status,
    list,
    more,
  );
  signal.addEventListener("abort", () => latest.abort());
  await restart();

  function query() {
    const [sort, order] = state.sort.split(" ");
    return { sort, order, show: state.show, q: state.q };
  }

  async function change(settings) {
    Object.assign(state, settings);
    const address = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
    if (parameters.has("with")) address.set("with", parameters.get("with"));
    // replaceState, so that typing neither adds history entries nor renders the whole page again.
    history.replaceState(null, "", `#/run/${encodeURIComponent(report.run_id)}?${address}`);
    await restart();
  }

  async function restart() {
    // Abort the previous request, so that its result cannot replace that of this one.
    latest.abort();
    latest = new AbortController();
    list.classList.add("stale");
    await load(latest.signal, null, true);
  }

  async function load(current, cursor, fresh) {
    show(more, h("p", { class: "loading" }, "Loading…"));
    try {
      let page = { samples: [], next: cursor };
      for (let tries = 0; tries < MAX_EMPTY_PAGES && page.samples.length === 0 && (tries === 0 || page.next); tries++) {
        page = await view.source.samples(report.run_id, { ...query(), limit: PER_PAGE, cursor: page.next }, current);
      }
      const loaded = await cards({ ...view, signal: current }, report, other, page.samples, revealButton.getAttribute("aria-pressed") === "true");
      if (current.aborted) return;
      if (fresh) show(list, loaded);
      else list.append(...loaded);
      list.classList.remove("stale");
      showStatus(current, page.next);
    } catch (error) {
      if (current.aborted) return;
      if (fresh) show(list);
      list.classList.remove("stale");
      show(more, view.errorBox(error, () => load(current, cursor, fresh)));
      status.textContent = "";
    }
  }

  function showStatus(current, next) {
    const found = list.children.length;
    const all = !state.q && state.show === "all";
    const missing = all && !state.sort.startsWith("index") ? (report.toxicity?.unscored ?? 0) : 0;
    if (found === 0 && !next) status.textContent = report.n === 0 ? "This run has no samples." : "No sample matches.";
    else status.textContent = `${count(found)}${all ? ` of ${count(report.n)}` : ""} samples${next && !all ? " so far" : ""}${missing ? `; ${count(missing)} not scored (choose Show: not scored)` : ""}`;
    announce(status.textContent);
    show(more, next ? h("button", { type: "button", onclick: () => load(current, next, false) }, state.q ? "Keep searching" : "More samples") : null);
  }
}

async function cards(view, report, other, samples, revealed) {
  let pairs = new Map();
  if (other && samples.length) {
    const found = await view.source.samplesAt(other.run_id, samples.map((sample) => sample.index), view.signal);
    pairs = new Map(found.map((sample) => [sample.index, sample]));
  }
  return samples.map((sample) => sampleCard(report, sample, other && { report: other, sample: pairs.get(sample.index) }, revealed));
}

function toggleAll(button, list) {
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(shown));
  button.textContent = shown ? "Hide all toxic text" : "Show all toxic text";
  for (const card of list.children) card.dispatchEvent(new CustomEvent("set-hidden", { detail: !shown }));
}
