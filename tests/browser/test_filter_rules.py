"""Agreement of the filter rules in JavaScript (standalone report), Python and SQL (stores)."""

import itertools
import math
from typing import Any

import pytest

from ray_detox.store.pages import (
    SHOWS,
    SORTS,
    SampleQuery,
    as_row,
    limits_of,
    matches,
)
from ray_detox.store.sqlite import SQLiteStore
from tests.browser.runs import make_report, make_samples

# The limits, a value just above one, and values that are not numbers.
TOXICITIES = (0, 0.25, 0.5, math.nextafter(0.5, 1), 0.75, 1, None, True, "0.9")
PAIRS = list(itertools.product(TOXICITIES, repeat=2))
TEXTS = ("STRASSE", "straße", "ẞ", "ΟΔΟΣΑ", "ΟΔΟΣ", "ırmak", "İstanbul", "ﬁne", "笨蛋", "", None)
SEARCHES = (
    "strasse",
    "ß",
    "ẞ",
    "οδος",
    "ΟΔΟΣ",
    "i",
    "ı",
    "I",
    "i\u0307",
    "FINE",
    "笨",
    "nowhere",
    "",
)
REPORTED_LIMITS: tuple[dict[str, Any], ...] = (
    {"toxic_above": 0.5, "same_within": 0.25},
    {"toxic_above": 0.75, "same_within": 0.0},
    {"toxic_above": None, "same_within": None},
    {},
)

# An element `embedded` makes openSource() return the source of a standalone report.
ASK_JAVASCRIPT = """
async ([report, samples, queries]) => {
  const embedded = document.createElement("div");
  embedded.id = "embedded";
  embedded.textContent = JSON.stringify({ report, history: [], samples });
  document.body.append(embedded);
  const { openSource } = await import("/source.js");
  const source = openSource();
  embedded.remove();
  const found = [];
  for (const query of queries) {
    const page = await source.samples(report.run_id, { ...query, limit: 1000 });
    found.push(page.samples.map((sample) => sample.index));
  }
  return found;
}
"""


def make_rows():
    samples = make_samples(len(PAIRS))
    for sample, (before, after), text in zip(samples, PAIRS, itertools.cycle(TEXTS)):
        sample |= {"toxicity_before": before, "toxicity_after": after, "response_after": text}
        sample["reward_before"] = (sample["index"] % 5) / 4  # many ties
        if sample["index"] % 7 == 0:
            del sample["reward_after"]
    return samples


def expected(samples, query, limits):
    rows = [row for row in map(as_row, samples) if matches(row, query, limits)]
    rows.sort(key=lambda row: (row[query.key], row["index"]), reverse=query.descending)
    return [row["index"] for row in rows]


@pytest.mark.parametrize("reported", REPORTED_LIMITS)
def test_javascript_python_and_sql_select_the_same_samples(open_page, address, tmp_path, reported):
    samples = make_rows()
    report = make_report("rules", make_samples(4)) | {"toxicity": reported}
    queries = [SampleQuery(*some) for some in itertools.product(SORTS, (False, True), SHOWS)]
    queries += [SampleQuery("index", False, "all", search) for search in SEARCHES]
    store = SQLiteStore(tmp_path / "rules.sqlite")
    store.put_run(report, samples)

    by_javascript = open_page(address).evaluate(
        ASK_JAVASCRIPT,
        [
            report,
            samples,
            [
                {
                    "sort": query.sort,
                    "order": "desc" if query.descending else "asc",
                    "show": query.show,
                    "q": query.search,
                }
                for query in queries
            ],
        ],
    )

    limits = limits_of(report)
    sizes = set()
    for query, found in zip(queries, by_javascript, strict=True):
        wanted = expected(samples, query, limits)
        page = store.sample_page("rules", query, limit=1000)
        assert found == wanted, query
        assert [row["index"] for row in page.rows] == wanted, query
        sizes.add(len(wanted))
    assert len(sizes) > 10  # the queries select different samples
