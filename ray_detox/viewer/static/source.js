// Sources of results: the API over HTTP, or the run embedded in a standalone report.

import { isNumber } from "./dom.js";
import { token } from "./auth.js";

const MAX_ATTEMPTS = 3;

/** An error with a message for the reader, and the HTTP status if there is one. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Open the source of this page; every method takes an AbortSignal as its last argument. */
export function openSource() {
  const embedded = document.getElementById("embedded");
  return embedded ? embeddedSource(JSON.parse(embedded.textContent)) : httpSource();
}

function httpSource() {
  const run = (id) => `/api/runs/${encodeURIComponent(id)}`;
  return {
    standalone: false,
    runs: (cursor, signal) => request("/api/runs", { limit: 50, cursor }, signal),
    run: (id, signal) => request(run(id), {}, signal),
    history: async (id, signal) => (await request(`${run(id)}/history`, {}, signal)).steps,
    samples: (id, query, signal) => request(`${run(id)}/samples`, query, signal),
    samplesAt: async (id, indices, signal) => (await request(`${run(id)}/samples`, { index: indices.join(",") }, signal)).samples,
    sample: (id, index, signal) => request(`${run(id)}/samples/${index}`, {}, signal),
  };
}

async function request(path, query, signal) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const address = given.length ? `${path}?${new URLSearchParams(given)}` : path;
  for (let attempt = 1; ; attempt++) {
    const response = await fetchOnce(address, signal);
    if (response.status === 503 && attempt < MAX_ATTEMPTS) {
      // The store is busy; the server says how long to wait.
      await pause(1000 * Math.min(Number(response.headers.get("retry-after")) || 2, 5), signal);
      continue;
    }
    return read(response);
  }
}

async function fetchOnce(address, signal) {
  const accessToken = token();
  try {
    return await fetch(address, { signal, headers: accessToken ? { authorization: `Bearer ${accessToken}` } : {} });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("Cannot reach the server. Check that you are online and that the server is running, then try again.");
  }
}

async function read(response) {
  let body = null;
  try {
    body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (response.ok && body !== null) return body;
  if (response.status === 401) throw new ApiError("Sign in to read these results.", 401);
  if (body !== null && typeof body.error === "string") throw new ApiError(body.error, response.status);
  throw new ApiError(`The server returned an invalid response (status ${response.status}). Try again in a moment.`, response.status);
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

/** The API's methods for an embedded run, with the filter rules of `store/pages.py`. */
function embeddedSource({ report, history: steps, samples }) {
  const rows = samples.map((sample) => ({
    ...sample,
    toxicity_diff: difference(sample, "toxicity"),
    reward_diff: difference(sample, "reward"),
  }));
  const checked = (id, value) => {
    if (id !== report.run_id) throw new ApiError(`This file contains run ${report.run_id} only.`, 404);
    return value;
  };
  const summary = { ...report };
  return {
    standalone: true,
    runs: async () => ({ runs: [summary], next: null }),
    run: async (id) => checked(id, report),
    history: async (id) => checked(id, steps),
    samples: async (id, query) => checked(id, pageOf(rows, query, report.toxicity ?? {})),
    samplesAt: async (id, indices) => checked(id, rows.filter((row) => indices.includes(row.index))),
    sample: async (id, index) => {
      const found = checked(id, rows.find((row) => row.index === Number(index)));
      if (!found) throw new ApiError(`Run ${report.run_id} has no sample ${index}.`, 404);
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
  const direction = query.order === "desc" ? -1 : 1;
  const wanted = fold(query.q);
  const found = rows
    .filter((row) => row[key] !== null && matches(row, query.show, limits))
    .filter((row) => !wanted || [row.query, row.reference, row.response_before, row.response_after].some((text) => fold(text).includes(wanted)))
    .sort((a, b) => direction * (a[key] - b[key] || a.index - b.index));
  const start = Number(query.cursor ?? 0);
  const end = start + Number(query.limit);
  return { samples: found.slice(start, end), next: end < found.length ? String(end) : null };
}

function matches(row, show, limits) {
  const above = isNumber(limits.toxic_above) ? limits.toxic_above : 0.5;
  const within = isNumber(limits.same_within) ? limits.same_within : 0;
  const diff = row.toxicity_diff;
  if (show === "all") return true;
  if (show === "unscored") return diff === null;
  if (show === "toxic_before") return isNumber(row.toxicity_before) && row.toxicity_before > above;
  if (show === "toxic_after") return isNumber(row.toxicity_after) && row.toxicity_after > above;
  if (diff === null) return false;
  return show === "better" ? diff < -within : show === "worse" ? diff > within : Math.abs(diff) <= within;
}

/** Remove differences of case as Python's `str.casefold` does: "straße" and "STRASSE" become equal. */
function fold(text) {
  // Upper case expands ß to SS. It also turns a dotless ı into I, which casefold keeps apart.
  const parts = String(text ?? "").split("ı");
  return parts
    .map((part) => part.toLowerCase().toUpperCase().toLowerCase())
    .join("ı")
    .replaceAll("ς", "σ");
}
