// The samples as a file: all that the filters show, as CSV or JSON.

import { announce, count, h } from "./dom.js";

const PER_PAGE = 100;

export function exportButtons({ source, signal }, report, query) {
  let running = null;
  const said = h("span", { class: "said", role: "status" });
  const button = (name, kind, make) =>
    h(
      "button",
      {
        type: "button",
        onclick: async () => {
          if (running) return running.abort();
          running = new AbortController();
          signal.addEventListener("abort", () => running?.abort());
          try {
            const rows = await all(running.signal);
            save(`${report.run_id}.${name.toLowerCase()}`, kind, make(rows));
            tell(`${count(rows.length)} samples saved`);
          } catch (error) {
            tell(error.name === "AbortError" ? "Stopped" : error.message);
          }
          running = null;
        },
      },
      `Save ${name}`,
    );
  const tell = (sentence) => {
    said.textContent = sentence;
    announce(sentence);
  };

  async function all(until) {
    const rows = [];
    let cursor = null;
    do {
      const page = await source.samples(report.run_id, { ...query(), limit: PER_PAGE, cursor }, until);
      for (const sample of page.samples) rows.push(sample.overflow ? await source.sample(report.run_id, sample.index, until) : sample);
      cursor = page.next;
      said.textContent = `${count(rows.length)} … press again to stop`;
    } while (cursor);
    return rows;
  }

  return h("span", { class: "exports" }, button("CSV", "text/csv", toCsv), button("JSON", "application/json", (rows) => JSON.stringify({ run: report, samples: rows }, null, 2)), said);
}

/** RFC 4180, with a mark that makes spreadsheets read UTF-8. */
export function toCsv(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const lines = [names, ...rows.map((row) => names.map((name) => row[name]))];
  return `\ufeff${lines.map((cells) => cells.map(cell).join(",")).join("\r\n")}\r\n`;
}

function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  let text = typeof value === "string" ? value : JSON.stringify(value);
  // A text that begins like a formula would be one in a spreadsheet.
  if (/^[\s]*[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return `"${text.replaceAll('"', '""')}"`;
}

function save(name, kind, text) {
  const address = URL.createObjectURL(new Blob([text], { type: `${kind};charset=utf-8` }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
