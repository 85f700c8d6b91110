// Keyboard shortcuts: j and k move through the samples, / searches, ? shows help.

import { h } from "./dom.js";

const KEYS = [
  ["j", "next sample"],
  ["k", "previous sample"],
  ["s", "show or hide the text of a toxic sample"],
  ["/", "search"],
  ["?", "show this help"],
];

export function startKeys() {
  addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, select, textarea");
    if (typing && event.key === "Escape") typing.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "s") document.activeElement.closest(".sample")?.querySelector("button.toggle-text")?.click();
    else if (event.key === "/") document.querySelector("input[type=search]")?.focus();
    else if (event.key === "?") help();
    else return;
    event.preventDefault();
  });
}

function move(step) {
  const samples = [...document.querySelectorAll(".sample")];
  if (samples.length === 0) return;
  const now = samples.indexOf(document.activeElement?.closest(".sample"));
  const next = now < 0 ? 0 : Math.min(Math.max(now + step, 0), samples.length - 1);
  samples[next].focus();
  samples[next].scrollIntoView({ block: "nearest" });
}

function help() {
  if (document.querySelector("dialog[open]")) return;
  const dialog = h(
    "dialog",
    { "aria-label": "Keyboard shortcuts", onclose: () => dialog.remove() },
    h("h2", {}, "Keyboard shortcuts"),
    h("dl", { class: "keys" }, KEYS.map(([key, action]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, action)])),
    h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close"),
  );
  document.body.append(dialog);
  dialog.showModal();
}
