// Save all samples that match the filters as a CSV or JSON file.

import { announce, count, h, isFormula, plain } from "./dom.js";

const PER_PAGE = 100;

export function exportButtons({ source, signal }, report, query) {
  let download = null;
  const status = h("span", { class: "status", role: "status" });
  const button = (name, mediaType, format) =>
    h(
      "button",
      {
        type: "button",
        onclick: async () => {
          if (download) return download.abort();
          download = new AbortController();
          signal.addEventListener("abort", () => download?.abort());
          try {
            const rows = await readAll(download.signal);
            save(`${report.run_id}.${name.toLowerCase()}`, mediaType, format(rows));
            showStatus(`${count(rows.length)} samples saved`);
          } catch (error) {
            showStatus(error.name === "AbortError" ? "Cancelled" : error.message);
          }
          download = null;
        },
      },
      `Save ${name}`,
    );
  const showStatus = (message) => {
    status.textContent = plain(message);
    announce(message);
  };

  async function readAll(abort) {
    const rows = [];
    let cursor = null;
    do {
      const page = await source.samples(report.run_id, { ...query(), limit: PER_PAGE, cursor }, abort);
      for (const sample of page.samples) rows.push(sample.overflow ? await source.sample(report.run_id, sample.index, abort) : sample);
      cursor = page.next;
      status.textContent = `${count(rows.length)} … click again to cancel`;
    } while (cursor);
    return rows;
  }

  return h("span", { class: "exports" }, button("CSV", "text/csv", toCsv), button("JSON", "application/json", (rows) => JSON.stringify({ run: report, samples: rows }, null, 2)), status);
}

/** CSV by RFC 4180, with a byte order mark so that spreadsheets read it as UTF-8. */
export function toCsv(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const lines = [names, ...rows.map((row) => names.map((name) => row[name]))];
  return `\ufeff${lines.map((cells) => cells.map(cell).join(",")).join("\r\n")}\r\n`;
}

function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  let text = typeof value === "string" ? value : JSON.stringify(value);
  // Quote text that a spreadsheet would run as a formula.
  if (isFormula(text)) text = `'${text}`;
  return `"${text.replaceAll('"', '""')}"`;
}

function save(name, mediaType, text) {
  const address = URL.createObjectURL(new Blob([text], { type: `${mediaType};charset=utf-8` }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
