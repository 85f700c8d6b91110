// Light or dark: as the system says, until the reader says otherwise.

import { h } from "./dom.js";

const KEY = "ray-detox-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;

// A browser may forbid storage; the choice then lasts as long as the page.
function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
}

/** The button that turns the theme around. */
export function themeButton() {
  const kept = stored();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  const button = h("button", { type: "button", class: "quiet", onclick: toggle });
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  };
  onTheme(label);
  label();
  return button;
}

function toggle() {
  root.dataset.theme = isDark() ? "light" : "dark";
  try {
    localStorage.setItem(KEY, root.dataset.theme);
  } catch {
    // See stored().
  }
  dispatchEvent(new Event("theme"));
}

/** Call back whenever the colours change: a canvas does not follow by itself. */
export function onTheme(callback, signal) {
  addEventListener("theme", callback, { signal });
  system.addEventListener("change", callback, { signal });
}

/** The value of a colour of style.css, for a canvas. */
export function colour(name) {
  const probe = h("span", { class: `colour-${name}` });
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
