// One sample: its answers side by side, what changed between them, and a veil where they are toxic.

import { h, isNumber, number, show, signed, visible } from "./dom.js";
import { diffWordsWithSpace } from "./vendor/jsdiff.js";

const LONGEST_DIFF = 8000;
const DIFF_MILLISECONDS = 200;

/**
 * The card of a sample. With `other` ({ report, sample }) the second side is another run's answer to
 * the same prompt.
 */
export function sampleCard(report, sample, other, revealed) {
  const above = report.toxicity?.toxic_above ?? 0.5;
  const sides = other ? sidesOfTwoRuns(report, sample, other) : sidesOfOneRun(sample);
  const isToxic = sides.some((side) => isNumber(side.toxicity) && side.toxicity > above);
  const name = `sample-${sample.index}`;
  const texts = h("div", { class: "texts", id: `${name}-texts` }, compared(sides), prompt(sample));
  const link = `#/run/${encodeURIComponent(report.run_id)}?sample=${sample.index}${other ? `&with=${encodeURIComponent(other.report.run_id)}` : ""}`;
  const card = h(
    "article",
    { class: "sample", tabindex: "-1", "aria-label": `Sample ${sample.index}` },
    h("header", {}, h("a", { href: link, class: "number", title: "A link to this sample" }, `#${sample.index}`), figures(sample, other)),
  );
  const veil = h("div", { class: "veil" }, texts);
  card.append(veil);
  if (isToxic) addVeil(card, veil, texts, name, revealed);
  if (sample.invalid?.length) card.append(h("p", { class: "cut" }, "Not finite, and stored as missing: ", visible(sample.invalid.join(", "))));
  if (sample.overflow?.length) card.append(h("p", { class: "cut" }, "Long texts are cut here; ", h("a", { href: link }, "the sample alone"), " has them whole."));
  return card;
}

function addVeil(card, veil, texts, name, revealed) {
  const button = h("button", { type: "button", class: "unveil", "aria-controls": `${name}-texts`, onclick: () => set(!texts.inert) });
  const set = (veiled) => {
    // inert: neither a screen reader nor the search of the browser reads what is veiled.
    texts.inert = veiled;
    veil.classList.toggle("veiled", veiled);
    button.textContent = veiled ? "Toxic text: show" : "Veil";
    button.setAttribute("aria-expanded", String(!veiled));
  };
  card.addEventListener("veil", (event) => set(event.detail));
  veil.prepend(button);
  set(!revealed);
}

function sidesOfOneRun(sample) {
  return ["before", "after"].map((side) => ({
    title: side === "before" ? "Before" : "After",
    text: sample[`response_${side}`],
    toxicity: sample[`toxicity_${side}`],
    about: about(sample, side),
  }));
}

function sidesOfTwoRuns(report, sample, other) {
  const same = other.sample && other.sample.prompt_id === sample.prompt_id;
  return [
    { title: `After, ${report.run_id}`, text: sample.response_after, toxicity: sample.toxicity_after, about: about(sample, "after") },
    same
      ? { title: `After, ${other.report.run_id}`, text: other.sample.response_after, toxicity: other.sample.toxicity_after, about: about(other.sample, "after") }
      : { title: `After, ${other.report.run_id}`, missing: true, toxicity: null, about: "" },
  ];
}

function about(sample, side) {
  const parts = [
    ["toxicity", number(sample[`toxicity_${side}`])],
    ["reward", number(sample[`reward_${side}`], 2)],
    isNumber(sample[`judge_${side}`]) ? ["judge", number(sample[`judge_${side}`], 2)] : null,
    isNumber(sample[`rouge_l_${side}`]) ? ["ROUGE-L", number(sample[`rouge_l_${side}`], 2)] : null,
    isNumber(sample[`length_${side}`]) ? ["tokens", String(sample[`length_${side}`])] : null,
  ];
  return parts.filter(Boolean).map(([name, value]) => h("span", {}, `${name} `, h("b", {}, value)));
}

function figures(sample, other) {
  if (other) return h("span", { class: "changes" });
  const toxicity = sample.toxicity_diff ?? null;
  const reward = sample.reward_diff ?? null;
  const feel = (value, good) => (!isNumber(value) || value === 0 ? "" : good ? "good" : "bad");
  const sign = (value) => (!isNumber(value) || value === 0 ? "" : value < 0 ? "▼ " : "▲ ");
  return h(
    "span",
    { class: "changes" },
    isNumber(toxicity) ? h("span", { class: feel(toxicity, toxicity < 0) }, `${sign(toxicity)}toxicity ${signed(toxicity)}`) : h("span", {}, "not scored"),
    isNumber(reward) ? h("span", {}, `reward ${signed(reward, 2)}`) : null,
    isNumber(sample.kl) ? h("span", {}, `KL ${number(sample.kl, 2)}`) : null,
  );
}

function compared(sides) {
  const changes = sides.some((side) => side.missing) ? null : difference(sides[0].text ?? "", sides[1].text ?? "");
  return h(
    "div",
    { class: "sides" },
    sides.map((side, i) =>
      h("div", { role: "group", "aria-label": side.title }, h("h3", {}, side.title), side.missing ? h("p", { class: "missing" }, "This prompt was not in that run.") : answer(side.text, changes, i), h("p", { class: "about" }, side.about)),
    ),
  );
}

function answer(text, changes, side) {
  if (text === null || text === undefined || text === "") return h("p", { class: "missing" }, "(empty)");
  const paragraph = h("p", { class: "answer", dir: "auto" });
  if (changes === null) show(paragraph, visible(text));
  else show(paragraph, changes.map((part) => piece(part, side)));
  return paragraph;
}

/** What was taken away stands struck on the left, what came underlined on the right. */
function piece(part, side) {
  if (side === 0) return part.added ? null : part.removed ? h("del", {}, visible(part.value)) : visible(part.value);
  return part.removed ? null : part.added ? h("ins", {}, visible(part.value)) : visible(part.value);
}

function difference(before, after) {
  if (before === after || before.length + after.length > LONGEST_DIFF) return null;
  return diffWordsWithSpace(before, after, { timeout: DIFF_MILLISECONDS }) ?? null;
}

function prompt(sample) {
  const facts = Array.isArray(sample.facts) && sample.facts.length ? `Facts to keep: ${sample.facts.join(" · ")}` : null;
  return h(
    "details",
    { class: "prompt" },
    h("summary", {}, "Prompt and reference"),
    h("h3", {}, "Prompt"),
    h("p", { class: "answer", dir: "auto" }, visible(String(sample.query ?? "").trim())),
    sample.reference ? [h("h3", {}, "Reference"), h("p", { class: "answer", dir: "auto" }, visible(sample.reference))] : null,
    facts ? h("p", { class: "about" }, visible(facts)) : null,
  );
}
