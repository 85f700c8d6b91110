// Elements and words. Whatever a model or a person wrote becomes text here, and never markup.

const ATTRIBUTES = new Set(
  "class id href type title role for value placeholder tabindex dir lang name download colspan scope rel target hidden open disabled checked selected inert maxlength autocomplete".split(" "),
);
const SVG = "http://www.w3.org/2000/svg";
// Addresses that a link may have: places on this page, and files made by it.
const ADDRESS = /^(#|blob:|https:\/\/|\.?\/)/;

/** An element: h("a", { href: "#/", class: "quiet" }, "Runs"). Children are nodes or texts. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG, where attributes are numbers and names of its own. */
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
    else if (!ATTRIBUTES.has(name) && !/^(aria|data)-[a-z-]+$/.test(name)) throw new Error(`no attribute ${name}`);
    else if (name === "href" && !ADDRESS.test(value)) throw new Error("no such link");
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put other children into an element. */
export function show(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
}

/** Tell those who do not see the page what has changed. */
export function announce(sentence) {
  document.getElementById("live").textContent = sentence;
}

const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/;

/** Untrusted text as nodes; characters that hide or turn text around are written out. */
export function visible(text) {
  const nodes = [];
  let plain = "";
  for (const character of String(text ?? "").replaceAll("\r\n", "\n")) {
    if (!STEERING.test(character)) {
      plain += character;
      continue;
    }
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(plain, h("span", { class: "steering", title: "A character that is not seen" }, `U+${code}`));
    plain = "";
  }
  return [...nodes, plain].filter((node) => node !== "");
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const MINUS = "\u2212";
const NOTHING = "\u2013";

/** 0.379; a dash where there is no number. */
export function number(value, digits = 3) {
  if (!isNumber(value)) return NOTHING;
  const rounded = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(rounded) !== 0 ? MINUS : "") + rounded;
}

/** +0.379 */
export function signed(value, digits = 3) {
  return isNumber(value) && Number(value.toFixed(digits)) > 0 ? `+${number(value, digits)}` : number(value, digits);
}

/** 91.5% */
export function percent(value, digits = 1) {
  return isNumber(value) ? `${number(100 * value, digits)}%` : NOTHING;
}

/** 12,460 */
export function count(value) {
  return isNumber(value) ? value.toLocaleString("en-GB") : NOTHING;
}

/** 31 Jan 2026, 12:00 UTC */
export function moment(text) {
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return String(text ?? "");
  const words = { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" };
  return `${time.toLocaleString("en-GB", { ...words, timeZone: "UTC" })} UTC`;
}

/** The mean of a figure that is a number or has one. */
export function mean(figure) {
  return figure !== null && typeof figure === "object" ? figure.mean : figure;
}
