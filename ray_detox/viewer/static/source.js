// Where runs come from: the API over HTTP, or the one run inside a standalone report.

import { isNumber } from "./dom.js";
import { token } from "./auth.js";

const TRIES = 3;

/** What went wrong, as a sentence for the reader. */
export class Problem extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

/** The data of this page; every call takes an AbortSignal last. */
export function openSource() {
  const embedded = document.getElementById("embedded");
  return embedded ? insideThisFile(JSON.parse(embedded.textContent)) : overHttp();
}

function overHttp() {
  const run = (id) => `/api/runs/${encodeURIComponent(id)}`;
  return {
    standalone: false,
    runs: (cursor, signal) => ask("/api/runs", { limit: 50, cursor }, signal),
    run: (id, signal) => ask(run(id), {}, signal),
    curves: async (id, signal) => (await ask(`${run(id)}/history`, {}, signal)).steps,
    samples: (id, query, signal) => ask(`${run(id)}/samples`, query, signal),
    samplesAt: async (id, indices, signal) => (await ask(`${run(id)}/samples`, { index: indices.join(",") }, signal)).samples,
    sample: (id, index, signal) => ask(`${run(id)}/samples/${index}`, {}, signal),
  };
}

async function ask(path, query, signal) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const address = given.length ? `${path}?${new URLSearchParams(given)}` : path;
  for (let attempt = 1; ; attempt++) {
    const answer = await fetchOnce(address, signal);
    if (answer.status === 503 && attempt < TRIES) {
      // Busy: the server says when to come back.
      await pause(1000 * Math.min(Number(answer.headers.get("retry-after")) || 2, 5), signal);
      continue;
    }
    return read(answer);
  }
}

async function fetchOnce(address, signal) {
  const bearer = token();
  try {
    return await fetch(address, { signal, headers: bearer ? { authorization: `Bearer ${bearer}` } : {} });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The results cannot be reached. See that you are online and that the server runs, then try again.");
  }
}

async function read(answer) {
  let body = null;
  try {
    body = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (answer.ok && body !== null) return body;
  if (answer.status === 401) throw new Problem("Sign in to read these results.", 401);
  if (body !== null && typeof body.error === "string") throw new Problem(body.error, answer.status);
  throw new Problem(`The server's answer (${answer.status}) is no result. Try again in a moment.`, answer.status);
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("aborted", "AbortError"));
    });
  });
}

/** The rules of the API, for one run that is at hand; see `store/pages.py`. */
function insideThisFile({ report, curves, samples }) {
  const rows = samples.map((sample) => ({
    ...sample,
    toxicity_diff: difference(sample, "toxicity"),
    reward_diff: difference(sample, "reward"),
  }));
  const only = (id, value) => {
    if (id !== report.run_id) throw new Problem(`This file has the run ${report.run_id} only.`, 404);
    return value;
  };
  const summary = { ...report };
  return {
    standalone: true,
    runs: async () => ({ runs: [summary], next: null }),
    run: async (id) => only(id, report),
    curves: async (id) => only(id, curves),
    samples: async (id, query) => only(id, pageOf(rows, query, report.toxicity ?? {})),
    samplesAt: async (id, indices) => only(id, rows.filter((row) => indices.includes(row.index))),
    sample: async (id, index) => {
      const found = only(id, rows.find((row) => row.index === Number(index)));
      if (!found) throw new Problem("There is no such sample.", 404);
      return found;
    },
  };
}

function difference(sample, name) {
  const before = sample[`${name}_before`];
  const after = sample[`${name}_after`];
  return isNumber(before) && isNumber(after) ? after - before : null;
}

function pageOf(rows, query, limits) {
  const key = query.sort === "index" || query.show === "unscored" ? "index" : `${query.sort}_diff`;
  const way = query.order === "desc" ? -1 : 1;
  // By way of capitals, as the stores do it: "straße" and "STRASSE" are one word.
  const fold = (text) => String(text ?? "").toUpperCase().toLowerCase();
  const wanted = fold(query.q);
  const found = rows
    .filter((row) => row[key] !== null && isShown(row, query.show, limits))
    .filter((row) => !wanted || [row.query, row.reference, row.response_before, row.response_after].some((text) => fold(text).includes(wanted)))
    .sort((a, b) => way * (a[key] - b[key] || a.index - b.index));
  const start = Number(query.cursor ?? 0);
  const end = start + Number(query.limit);
  return { samples: found.slice(start, end), next: end < found.length ? String(end) : null };
}

function isShown(row, show, { toxic_above: above = 0.5, same_within: within = 0 }) {
  const diff = row.toxicity_diff;
  if (show === "unscored") return diff === null;
  if (show === "toxic_before") return row.toxicity_before > above;
  if (show === "toxic_after") return row.toxicity_after > above;
  if (show === "all") return true;
  if (diff === null) return false;
  return show === "better" ? diff < -within : show === "worse" ? diff > within : Math.abs(diff) <= within;
}
