// DOM elements and number formats. Untrusted text always becomes a text node, never markup, and its
// invisible characters appear as their code point.

const ATTRIBUTES = new Set(
  "class id href type title role for value placeholder tabindex dir lang name download colspan scope rel target hidden open disabled checked selected inert maxlength autocomplete".split(" "),
);
const SVG = "http://www.w3.org/2000/svg";
// Attributes whose value a reader sees.
const SHOWN = /^(aria-|title$|placeholder$|download$)/;
// Link targets that are allowed: this page, https, relative paths, and blobs for saved files.
const ADDRESS = /^(#|blob:|https:\/\/|\.?\/)/;

/** Create an element: h("a", { href: "#/", class: "quiet" }, "Runs"). Children are nodes or strings. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Create an SVG element; any attribute is allowed. */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children.flat(9));
  return element;
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (!ATTRIBUTES.has(name) && !/^(aria|data)-[a-z-]+$/.test(name)) throw new Error(`attribute ${name} is not allowed; add it to ATTRIBUTES`);
    else if (name === "href" && !ADDRESS.test(value)) throw new Error(`link to ${value} is not allowed; see ADDRESS`);
    else element.setAttribute(name, value === true ? "" : SHOWN.test(name) ? plain(value) : String(value));
  }
  element.append(...nodes(children));
  return element;
}

/** A part of the page; a sentence instead if the stored values are of kinds that it cannot show. */
export function part(make) {
  try {
    return make();
  } catch (error) {
    console.warn(error);
    return h("p", { class: "odd" }, "This part cannot be shown: the stored report has values of an unexpected kind.");
  }
}

function nodes(children) {
  return children.flat(9).flatMap((child) => (child === null || child === undefined || child === false ? [] : child instanceof Node ? [child] : visible(child)));
}

/** Replace the children of an element. */
export function show(element, ...children) {
  element.replaceChildren(...nodes(children));
}

/** Announce a change to screen readers. */
export function announce(message) {
  document.getElementById("live").textContent = plain(message);
}

// Control characters, and characters that are invisible or change the text direction; as in
// ray_detox/runs/printable.py. Ends of lines and tabs stay.
const INVISIBLE = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/u;
// Say whether a symbol is drawn in colour; dropped.
const EMOJI_STYLE = /[\ufe0e\ufe0f]/gu;

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Untrusted text as nodes; control and invisible characters appear as their code point. */
function visible(text) {
  const found = [];
  let plain = "";
  for (const character of cleaned(text)) {
    if (!INVISIBLE.test(character)) {
      plain += character;
      continue;
    }
    const mark = document.createElement("span");
    mark.className = "control-character";
    mark.title = "Control or invisible character";
    mark.append(codePoint(character));
    found.push(plain, mark);
    plain = "";
  }
  return [...found, plain].filter((node) => node !== "");
}

/** Untrusted text for a place that holds only text, such as the title of the window. */
export function plain(text) {
  return Array.from(cleaned(text), (character) => (INVISIBLE.test(character) ? codePoint(character) : character)).join("");
}

function cleaned(text) {
  return String(text ?? "").replaceAll("\r\n", "\n").replace(EMOJI_STYLE, "");
}

/** Whether a spreadsheet could run a text as a formula, whatever invisible characters precede it. */
export function isFormula(text) {
  return /^[\s\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Default_Ignorable_Code_Point}]*[=+\-@\u2212]/u.test(text.normalize("NFKC")) || /^[\t\r]/.test(text);
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const MINUS = "\u2212";
const MISSING = "\u2013";

/** 0.379; a dash if the value is not a number. */
export function number(value, digits = 3) {
  if (!isNumber(value)) return MISSING;
  const rounded = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(rounded) !== 0 ? MINUS : "") + rounded;
}

/** +0.379 */
export function signed(value, digits = 3) {
  return isNumber(value) && Number(value.toFixed(digits)) > 0 ? `+${number(value, digits)}` : number(value, digits);
}

/** Whether toxicity rose, as far as its reduction in percent shows it. */
export const rose = (improvement) => isNumber(improvement) && improvement <= -0.0005;

/** 91.5% */
export function percent(value, digits = 1) {
  return isNumber(value) ? `${number(100 * value, digits)}%` : MISSING;
}

/** 12,460 */
export function count(value) {
  return isNumber(value) ? value.toLocaleString("en-GB") : MISSING;
}

/** 31 Jan 2026, 12:00 UTC */
export function moment(text) {
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return String(text ?? "");
  const format = { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" };
  return `${time.toLocaleString("en-GB", { ...format, timeZone: "UTC" })} UTC`;
}

/** The moment for a list, which says so if a clock was ahead. `store/pages.py` has the same limit. */
export function listedMoment(text) {
  const isAhead = new Date(text).getTime() - Date.now() >= 24 * 60 * 60 * 1000;
  return isAhead ? `${moment(text)}, clock was ahead` : moment(text);
}

/** The mean of a metric that is either a number or an object with a `mean`. */
export function mean(metric) {
  return metric !== null && typeof metric === "object" ? metric.mean : metric;
}
