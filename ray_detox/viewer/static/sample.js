// One sample: two responses side by side with their differences; toxic text is hidden at first.

import { h, isNumber, number, show, signed } from "./dom.js";
import { diffArrays } from "./vendor/jsdiff.js";

const LONGEST_DIFF = 8000;
const DIFF_MILLISECONDS = 200;
// Units of the diff: a speaker such as #Person1#, a word, white space, or any other character.
// Scripts without spaces between words are compared by character.
const TOKEN = /#\w+#|(?:(?!\p{sc=Han}|\p{sc=Hiragana}|\p{sc=Katakana}|\p{sc=Thai})[\p{L}\p{M}\p{N}_])+|\s+|./gsu;

/**
 * The card of a sample. With `other` ({ report, sample }), the second side is the other run's response
 * to the same prompt.
 */
export function sampleCard(report, sample, other, revealed) {
  const threshold = report.toxicity?.toxic_above ?? 0.5;
  const sides = other ? sidesOfTwoRuns(report, sample, other) : sidesOfOneRun(sample);
  const isToxic = sides.some((side) => isNumber(side.toxicity) && side.toxicity > threshold);
  const name = `sample-${sample.index}`;
  const texts = h("div", { class: "texts", id: `${name}-texts` }, sideBySide(sides), prompt(sample));
  const link = `#/run/${encodeURIComponent(report.run_id)}?sample=${sample.index}${other ? `&with=${encodeURIComponent(other.report.run_id)}` : ""}`;
  const card = h(
    "article",
    { class: "sample", tabindex: "-1", "aria-label": `Sample ${sample.index}` },
    h("header", {}, h("a", { href: link, class: "number", title: "Link to this sample" }, `#${sample.index}`), changeSummary(report, sample, other)),
  );
  card.append(texts);
  if (isToxic) addToggle(card, texts, name, revealed);
  if (sample.invalid?.length) card.append(h("p", { class: "note" }, "Stored as missing because not finite: ", sample.invalid.join(", ")));
  if (sample.overflow?.length) card.append(h("p", { class: "note" }, ...truncationNote(link)));
  return card;
}

function truncationNote(link) {
  if (location.hash === link) return ["Long texts are truncated because they exceed the size limit of the API. The run's samples.jsonl has the full texts."];
  return ["Long texts are truncated here. ", h("a", { href: link }, "Open the sample"), " to read the full texts."];
}

function addToggle(card, texts, name, revealed) {
  const button = h("button", { type: "button", class: "toggle-text", "aria-controls": `${name}-texts`, onclick: () => setHidden(!texts.inert) });
  const setHidden = (hidden) => {
    // inert keeps hidden text from screen readers and from the browser's own search.
    texts.inert = hidden;
    card.classList.toggle("toxic-hidden", hidden);
    button.textContent = hidden ? "Show toxic text" : "Hide";
    button.setAttribute("aria-expanded", String(!hidden));
  };
  card.addEventListener("set-hidden", (event) => setHidden(event.detail));
  card.querySelector("header").append(button);
  setHidden(!revealed);
}

function sidesOfOneRun(sample) {
  return ["before", "after"].map((side) => ({
    title: side === "before" ? "Before" : "After",
    text: sample[`response_${side}`],
    toxicity: sample[`toxicity_${side}`],
    metrics: metrics(sample, side),
  }));
}

function sidesOfTwoRuns(report, sample, other) {
  const same = other.sample && other.sample.prompt_id === sample.prompt_id;
  return [
    { title: `After, ${report.run_id}`, text: sample.response_after, toxicity: sample.toxicity_after, metrics: metrics(sample, "after") },
    same
      ? { title: `After, ${other.report.run_id}`, text: other.sample.response_after, toxicity: other.sample.toxicity_after, metrics: metrics(other.sample, "after") }
      : { title: `After, ${other.report.run_id}`, missing: true, toxicity: null, metrics: "" },
  ];
}

function metrics(sample, side) {
  const parts = [
    ["toxicity", number(sample[`toxicity_${side}`])],
    ["reward", number(sample[`reward_${side}`], 2)],
    isNumber(sample[`judge_${side}`]) ? ["judge", number(sample[`judge_${side}`], 2)] : null,
    isNumber(sample[`rouge_l_${side}`]) ? ["ROUGE-L", number(sample[`rouge_l_${side}`], 2)] : null,
    isNumber(sample[`length_${side}`]) ? ["tokens", String(sample[`length_${side}`])] : null,
  ];
  return parts.filter(Boolean).map(([name, value]) => h("span", {}, `${name} `, h("b", {}, value)));
}

function changeSummary(report, sample, other) {
  const delta = (one, two, name) => (isNumber(one?.[name]) && isNumber(two?.[name]) ? two[name] - one[name] : null);
  const [toxicity, reward, kl] = other
    ? [delta(sample, other.sample, "toxicity_after"), delta(sample, other.sample, "reward_after"), null]
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
  const [direction, sign] = Math.abs(toxicity) <= within ? ["", ""] : toxicity < 0 ? ["good", "▼ "] : ["bad", "▲ "];
  return h("span", { class: direction }, `${sign}toxicity ${signed(toxicity)}`);
}

function sideBySide(sides) {
  const changes = sides.some((side) => side.missing) ? null : difference(sides[0].text ?? "", sides[1].text ?? "");
  return h(
    "div",
    { class: "sides" },
    sides.map((side, i) =>
      h("div", { role: "group", "aria-label": side.title }, h("h3", {}, side.title), side.missing ? h("p", { class: "missing" }, "That run did not evaluate this prompt.") : response(side.text, changes, i), h("p", { class: "about" }, side.metrics)),
    ),
  );
}

function response(text, changes, side) {
  if (text === null || text === undefined || text === "") return h("p", { class: "missing" }, "(empty)");
  const paragraph = h("p", { class: "response", dir: "auto" });
  if (changes === null) show(paragraph, text);
  else show(paragraph, pieces(changes, side).map((piece) => (piece.changed ? marked(piece.text, side) : piece.text)));
  return paragraph;
}

/** The text of one side in pieces; white space between two changes joins them into one piece. */
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

/** Mark a change as removed (left side) or inserted (right side), without the white space around it. */
function marked(text, side) {
  const mark = (some) => h(side === 0 ? "del" : "ins", {}, some);
  const words = text.trim();
  if (!words) return mark(text);
  const start = text.indexOf(words);
  return [text.slice(0, start), mark(words), text.slice(start + words.length)];
}

function difference(before, after) {
  if (before === after || before.length + after.length > LONGEST_DIFF) return null;
  return diffArrays(before.match(TOKEN) ?? [], after.match(TOKEN) ?? [], { timeout: DIFF_MILLISECONDS }) ?? null;
}

function prompt(sample) {
  const facts = Array.isArray(sample.facts) && sample.facts.length ? `Facts to keep: ${sample.facts.join(" · ")}` : null;
  const references = [sample.reference, ...(Array.isArray(sample.more_references) ? sample.more_references : [])].filter((text) => typeof text === "string" && text);
  return h(
    "details",
    { class: "prompt" },
    h("summary", {}, "Prompt and reference"),
    h("h3", {}, "Prompt"),
    h("p", { class: "response", dir: "auto" }, String(sample.query ?? "").trim()),
    references.map((text) => [h("h3", {}, "Reference"), h("p", { class: "response", dir: "auto" }, text)]),
    facts ? h("p", { class: "about" }, facts) : null,
  );
}
