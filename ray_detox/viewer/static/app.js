// The page: which view an address shows, and what all views share.
//
//   #/                                the runs
//   #/run/ID?sort=..&show=..&q=..     one run: overview.js and samples.js
//   #/run/ID?sample=17                one sample of it
//   #/run/ID?with=OTHER               beside another run: compare.js

import { announce, h, show } from "./dom.js";
import { Problem, openSource } from "./source.js";
import { canSignIn, signIn, signOut, startAuth, token } from "./auth.js";
import { startKeys } from "./keys.js";
import { themeButton } from "./theme.js";
import { showRuns } from "./runs.js";
import { showRun } from "./run.js";

const main = document.getElementById("main");
let source = null;
let leaving = new AbortController();

/** The address as a path and its parameters. */
function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  let parts = [];
  try {
    parts = path.split("/").map(decodeURIComponent);
  } catch {
    // A broken address shows the runs.
  }
  return { parts, parameters: new URLSearchParams(query ?? "") };
}

async function render() {
  // What an earlier view still waits for must not appear in this one.
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { parts, parameters } = place();
  const isRun = parts[0] === "run" && parts[1];
  show(main, h("p", { class: "loading" }, "Loading…"));
  const view = { main, source, signal, parameters, fail: (error, retry) => failed(error, retry) };
  try {
    if (isRun) await showRun(view, parts[1]);
    else if (source.standalone) location.replace(`#/run/${(await source.runs()).runs[0].run_id}`);
    else await showRuns(view);
  } catch (error) {
    if (signal.aborted) return;
    show(main, h("h1", {}, error.status === 404 ? "Not found" : "Not shown"), failed(error, render));
  }
}

/** A box that says what went wrong, with a way on. */
function failed(error, retry) {
  const known = error instanceof Problem;
  if (!known) console.error(error);
  const sentence = known ? error.message : "Something on this page went wrong; reload it.";
  announce(sentence);
  const needsSignIn = known && error.status === 401 && canSignIn();
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("p", {}, sentence),
    needsSignIn
      ? h("button", { type: "button", class: "primary", onclick: signIn }, "Sign in")
      : h("button", { type: "button", class: "primary", onclick: retry }, "Try again"),
    known && error.status === 404 ? h("a", { href: "#/" }, "All runs") : null,
  );
}

function showBar() {
  show(
    document.getElementById("bar"),
    h("a", { class: "brand", href: "#/" }, h("span", { "aria-hidden": "true", class: "mark" }), "ray-detox"),
    h(
      "nav",
      { "aria-label": "Page" },
      source.standalone ? null : h("a", { href: "#/" }, "Runs"),
      token() ? h("button", { type: "button", class: "quiet", onclick: signOut }, "Sign out") : null,
      themeButton(),
    ),
  );
}

async function start() {
  await startAuth();
  source = openSource();
  showBar();
  startKeys();
  addEventListener("hashchange", render);
  await render();
}

start();
