// One sample: its answers side by side, what changed between them, and a veil where they are toxic.

import { h, isNumber, number, show, signed, visible } from "./dom.js";
import { diffArrays } from "./vendor/jsdiff.js";

const LONGEST_DIFF = 8000;
const DIFF_MILLISECONDS = 200;
// What changes as a whole: a speaker such as #Person1#, a word, a space, or any other character.
// Scripts that write without spaces have no words to go by, and change by the character.
const TOKEN = /#\w+#|(?:(?!\p{sc=Han}|\p{sc=Hiragana}|\p{sc=Katakana}|\p{sc=Thai})[\p{L}\p{M}\p{N}_])+|\s+|./gsu;

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
    h("header", {}, h("a", { href: link, class: "number", title: "A link to this sample" }, `#${sample.index}`), figures(report, sample, other)),
  );
  card.append(texts);
  if (isToxic) addVeil(card, texts, name, revealed);
  if (sample.invalid?.length) card.append(h("p", { class: "cut" }, "Not finite, and stored as missing: ", visible(sample.invalid.join(", "))));
  if (sample.overflow?.length) card.append(h("p", { class: "cut" }, ...cutNote(link)));
  return card;
}

function cutNote(link) {
  if (location.hash === link) return ["Long texts are cut here too: they are more than an answer may hold. The run's samples.jsonl has them whole."];
  return ["Long texts are cut here; ", h("a", { href: link }, "the sample alone"), " has them whole."];
}

function addVeil(card, texts, name, revealed) {
  const button = h("button", { type: "button", class: "unveil", "aria-controls": `${name}-texts`, onclick: () => set(!texts.inert) });
  const set = (veiled) => {
    // inert: neither a screen reader nor the search of the browser reads what is veiled.
    texts.inert = veiled;
    card.classList.toggle("veiled", veiled);
    button.textContent = veiled ? "Toxic text: show" : "Veil";
    button.setAttribute("aria-expanded", String(!veiled));
  };
  card.addEventListener("veil", (event) => set(event.detail));
  card.querySelector("header").append(button);
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

function figures(report, sample, other) {
  const of = (one, two, name) => (isNumber(one?.[name]) && isNumber(two?.[name]) ? two[name] - one[name] : null);
  const [toxicity, reward, kl] = other
    ? [of(sample, other.sample, "toxicity_after"), of(sample, other.sample, "reward_after"), null]
    : [sample.toxicity_diff, sample.reward_diff, sample.kl];
  return h(
    "span",
    { class: "changes" },
    isNumber(toxicity) ? change(toxicity, report.toxicity?.same_within ?? 0.0005) : other ? null : h("span", {}, "not scored"),
    isNumber(reward) ? h("span", {}, `reward ${signed(reward, 2)}`) : null,
    isNumber(kl) ? h("span", {}, `KL ${number(kl, 2)}`) : null,
  );
}

function change(toxicity, within) {
  const [kind, sign] = Math.abs(toxicity) <= within ? ["", ""] : toxicity < 0 ? ["good", "▼ "] : ["bad", "▲ "];
  return h("span", { class: kind }, `${sign}toxicity ${signed(toxicity)}`);
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
  else show(paragraph, pieces(changes, side).map((piece) => (piece.changed ? marked(piece.text, side) : visible(piece.text))));
  return paragraph;
}

/** The text of one side in pieces; a space between two changes belongs to them, so that they read as one. */
function pieces(changes, side) {
  const made = [];
  const isChange = (part) => part?.added || part?.removed;
  changes.forEach((part, i) => {
    if (side === 0 ? part.added : part.removed) return;
    const text = part.value.join("");
    const changed = Boolean(isChange(part) || (text.trim() === "" && isChange(changes[i - 1]) && isChange(changes[i + 1])));
    if (made.length && made.at(-1).changed === changed) made.at(-1).text += text;
    else made.push({ text, changed });
  });
  return made;
}

/** What was taken away is struck on the left, what came is underlined on the right; spaces around words are not. */
function marked(text, side) {
  const mark = (some) => h(side === 0 ? "del" : "ins", {}, visible(some));
  const words = text.trim();
  if (!words) return mark(text);
  const start = text.indexOf(words);
  return [visible(text.slice(0, start)), mark(words), visible(text.slice(start + words.length))];
}

function difference(before, after) {
  if (before === after || before.length + after.length > LONGEST_DIFF) return null;
  return diffArrays(before.match(TOKEN) ?? [], after.match(TOKEN) ?? [], { timeout: DIFF_MILLISECONDS }) ?? null;
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
