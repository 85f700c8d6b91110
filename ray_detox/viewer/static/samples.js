// The samples of a run: the tools above them, and the list that grows as it is read.

import { announce, count, h, show } from "./dom.js";
import { exportButtons } from "./export.js";
import { sampleCard } from "./sample.js";

const PER_PAGE = 25;
// A search may look at many samples and find none; it goes on by itself this often.
const EMPTY_PAGES = 3;

const SORTS = [
  ["toxicity desc", "toxicity: worst change first"],
  ["toxicity asc", "toxicity: best change first"],
  ["reward asc", "reward: worst change first"],
  ["reward desc", "reward: best change first"],
  ["index asc", "as they came"],
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

/** Show samples as the address asks for; `other` is the run to compare with, or null. */
export async function showSamples(view, report, other, section) {
  const { parameters } = view;
  const index = parameters.get("sample");
  if (index !== null && /^[0-9]{1,8}$/.test(index)) await showOne(view, report, other, section, Number(index));
  else await showList(view, report, other, section);
}

async function showOne(view, report, other, section, index) {
  const { source, signal, parameters, fail } = view;
  const back = new URLSearchParams(parameters);
  back.delete("sample");
  const heading = [h("h2", {}, `Sample ${index}`), h("p", {}, h("a", { href: `#/run/${encodeURIComponent(report.run_id)}?${back}` }, "All samples of this run"))];
  try {
    const sample = await source.sample(report.run_id, index, signal);
    show(section, heading, await cards(view, report, other, [sample], true));
  } catch (error) {
    if (!signal.aborted) show(section, heading, fail(error, () => showOne(view, report, other, section, index)));
  }
}

async function showList(view, report, other, section) {
  const { signal, parameters } = view;
  const known = (name, choices) => (choices.some(([value]) => value === parameters.get(name)) ? parameters.get(name) : choices[0][0]);
  const state = { sort: known("sort", SORTS), show: known("show", SHOWS), q: (parameters.get("q") ?? "").slice(0, 200) };
  const list = h("div", { class: "samples" });
  const more = h("div", { class: "more" });
  const said = h("p", { class: "said", role: "status" });
  const reveal = h("button", { type: "button", "aria-pressed": "false", onclick: () => revealAll(reveal, list) }, "Show toxic text");
  let newest = new AbortController();

  const pick = (label, name, choices) =>
    h("label", {}, h("span", {}, label), h("select", { name, onchange: (event) => change({ [name]: event.target.value }) }, choices.map(([value, words]) => h("option", { value, selected: value === state[name] }, words))));
  let waiting = 0;
  const search = h("input", {
    type: "search",
    value: state.q,
    maxlength: "200",
    placeholder: "words in prompt or answers",
    autocomplete: "off",
    oninput: () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => change({ q: search.value }), 250);
    },
  });
  show(
    section,
    h("h2", {}, "Before and after, prompt by prompt"),
    h(
      "div",
      { class: "tools", role: "search" },
      pick("Sort by", "sort", SORTS),
      pick("Show", "show", SHOWS),
      h("label", { class: "grow" }, h("span", {}, "Search"), search),
      reveal,
      exportButtons(view, report, () => query()),
    ),
    said,
    list,
    more,
  );
  signal.addEventListener("abort", () => newest.abort());
  await restart();

  function query() {
    const [sort, order] = state.sort.split(" ");
    return { sort, order, show: state.show, q: state.q };
  }

  async function change(some) {
    Object.assign(state, some);
    const now = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
    if (parameters.has("with")) now.set("with", parameters.get("with"));
    // replaceState: typing should not fill the history, nor draw the whole page again.
    history.replaceState(null, "", `#/run/${encodeURIComponent(report.run_id)}?${now}`);
    await restart();
  }

  async function restart() {
    // An answer to an earlier question must not come after that to a later one.
    newest.abort();
    newest = new AbortController();
    list.classList.add("stale");
    await load(newest.signal, null, true);
  }

  async function load(current, cursor, fresh) {
    show(more, h("p", { class: "loading" }, "Loading…"));
    try {
      let page = { samples: [], next: cursor };
      for (let tries = 0; tries < EMPTY_PAGES && page.samples.length === 0 && (tries === 0 || page.next); tries++) {
        page = await view.source.samples(report.run_id, { ...query(), limit: PER_PAGE, cursor: page.next }, current);
      }
      const made = await cards({ ...view, signal: current }, report, other, page.samples, reveal.getAttribute("aria-pressed") === "true");
      if (current.aborted) return;
      if (fresh) show(list, made);
      else list.append(...made);
      list.classList.remove("stale");
      shown(current, page.next);
    } catch (error) {
      if (current.aborted) return;
      if (fresh) show(list);
      list.classList.remove("stale");
      show(more, view.fail(error, () => load(current, cursor, fresh)));
      said.textContent = "";
    }
  }

  function shown(current, next) {
    const found = list.children.length;
    const all = !state.q && state.show === "all";
    const missing = all && !state.sort.startsWith("index") ? (report.toxicity?.unscored ?? 0) : 0;
    if (found === 0 && !next) said.textContent = report.n === 0 ? "This run has no samples." : "No sample answers to that.";
    else said.textContent = `${count(found)}${all ? ` of ${count(report.n)}` : ""} samples${next && !all ? " so far" : ""}${missing ? `; ${count(missing)} not scored, see Show` : ""}`;
    announce(said.textContent);
    show(more, next ? h("button", { type: "button", onclick: () => load(current, next, false) }, state.q ? "Search on" : "More samples") : null);
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

function revealAll(button, list) {
  const now = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(now));
  button.textContent = now ? "Veil toxic text" : "Show toxic text";
  for (const card of list.children) card.dispatchEvent(new CustomEvent("veil", { detail: !now }));
}
