// The page: routes an address to a view, and shows the parts that all views share.
//
//   #/                                list of runs: runs.js
//   #/run/ID?sort=..&show=..&q=..     one run: run.js and samples.js
//   #/run/ID?sample=17                one sample of a run
//   #/run/ID?with=OTHER               a run compared with another: compare.js

import { announce, h, show } from "./dom.js";
import { ApiError, openSource } from "./source.js";
import { canSignIn, signIn, signOut, startAuth, token } from "./auth.js";
import { startKeys } from "./keys.js";
import { themeButton } from "./theme.js";
import { showRuns } from "./runs.js";
import { showRun } from "./run.js";

const main = document.getElementById("main");
let source = null;
let viewAbort = new AbortController();

/** Split the address into path and parameters. */
function parseAddress() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  let parts = [];
  try {
    parts = path.split("/").map(decodeURIComponent);
  } catch {
    // A malformed address shows the list of runs.
  }
  return { parts, parameters: new URLSearchParams(query ?? "") };
}

async function render() {
  // Abort the requests of the previous view, so that their results cannot appear in this one.
  viewAbort.abort();
  viewAbort = new AbortController();
  const { signal } = viewAbort;
  const { parts, parameters } = parseAddress();
  const isRun = parts[0] === "run" && parts[1];
  show(main, h("p", { class: "loading" }, "Loading…"));
  const view = { main, source, signal, parameters, errorBox };
  try {
    if (isRun) await showRun(view, parts[1]);
    else if (source.standalone) location.replace(`#/run/${(await source.runs()).runs[0].run_id}`);
    else await showRuns(view);
  } catch (error) {
    if (signal.aborted) return;
    show(main, h("h1", {}, error.status === 404 ? "Not found" : "Error"), errorBox(error, render));
  }
}

/** A box with the message of an error and a button to retry or sign in. */
function errorBox(error, retry) {
  const known = error instanceof ApiError;
  if (!known) console.error(error);
  const message = known ? error.message : "The page has an internal error; reload it.";
  announce(message);
  const needsSignIn = known && error.status === 401 && canSignIn();
  return h(
    "div",
    { class: "error", role: "alert" },
    h("p", {}, message),
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
      { "aria-label": "Main" },
      source.standalone ? null : h("a", { href: "#/" }, "Runs"),
      token() ? h("button", { type: "button", class: "quiet", onclick: signOut }, "Sign out") : null,
      themeButton(),
    ),
  );
}

async function start() {
  // The server has kept its key in a cookie; a bookmark or a screenshot must not contain it.
  if (new URLSearchParams(location.search).has("key")) history.replaceState(null, "", `/${location.hash}`);
  await startAuth();
  source = openSource();
  showBar();
  startKeys();
  addEventListener("hashchange", render);
  await render();
}

start();
