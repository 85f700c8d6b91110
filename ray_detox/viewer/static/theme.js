// Light or dark colours: the system's setting, unless the reader chose one.

import { h } from "./dom.js";

const KEY = "ray-detox-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;

// A browser may forbid storage; the choice then lasts until the page is closed.
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

/** The button that switches between light and dark colours. */
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
    // Without storage, the choice lasts until the page is closed.
  }
  dispatchEvent(new Event("theme"));
}

/** Call back when the colours change, because a canvas has to be redrawn. */
export function onTheme(callback, signal) {
  addEventListener("theme", callback, { signal });
  system.addEventListener("change", callback, { signal });
}

/** The current value of a colour of style.css, to draw on a canvas. */
export function colour(name) {
  const probe = h("span", { class: `colour-${name}` });
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
