"""Measure how fast results are stored and read: rows per second, a repeat, the first page.

    python scripts/bench_results.py --samples 10000 --page-of 100000

Measures SQLite and moto, and dynalite if scripts/test_tools.sh has installed it. The emulators show the
cost of our side of a publish; they say nothing about the speed of AWS.
"""

import argparse
import contextlib
import logging
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.protocol import ResultStore
from ray_detox.store.sqlite import SQLiteStore
from ray_detox.viewer.handler import respond
from tests.emulators import emulator

PAGES = {
    "original order": "sort=index",
    "worst change first": "sort=toxicity&order=desc",
    "best change first": "sort=toxicity&order=asc",
    "best reward first, toxic after": "sort=reward&order=desc&show=toxic_after",
    "worst reward first, worse only": "sort=reward&order=asc&show=worse",
    "original order, unchanged (none)": "sort=index&show=same",
    "not scored (1 in 1,000)": "show=unscored",
    "search, in 1 of 100 (reads texts)": "q=parcel",
}
REPEATS = 20

Writes = Callable[[], int]


def samples_of(count: int) -> list[dict[str, Any]]:
    """Return samples of the size that a run on DialogSum stores, about 2 kB."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(2000)]
    samples = []
    for index in range(count):
        text = " ".join(draw.choices(words, k=140))
        before, after = draw.random(), draw.random() ** 2
        samples.append(
            {
                "index": index,
                "prompt_id": f"{index:016x}",
                "query": text if index % 100 else f"{text} parcel",
                "reference": text[:150],
                "response_before": text[100:250],
                "response_after": text[200:350],
                "toxicity_before": before,
                "toxicity_after": after if index % 1000 else None,
                "reward_before": 1 - 4 * before,
                "reward_after": 1 - 4 * after,
                "kl": draw.random(),
            }
        )
    return samples


def report_of(count: int) -> dict[str, Any]:
    """Return a report with only the required names."""
    return {
        "run_id": f"run-of-{count}",
        "recipe": "bench",
        "status": "complete",
        "created": "2026-01-31T12:00:00+00:00",
        "n": count,
        "verdict": {"name": "improved"},
        "toxicity": {"toxic_above": 0.5},
    }


@contextlib.contextmanager
def sqlite_store(folder: Path) -> Iterator[tuple[ResultStore, Writes]]:
    """Yield a store in a file, and a count of the commits that changed the file."""
    store = SQLiteStore(folder / "results.sqlite")
    store.put_run(report_of(0), [])
    with contextlib.closing(sqlite3.connect(store.path)) as watch:
        yield store, lambda: int(watch.execute("PRAGMA data_version").fetchone()[0])


@contextlib.contextmanager
def dynamodb_store(name: str) -> Iterator[tuple[ResultStore, Writes]]:
    """Yield a store on an emulator, and a count of the write requests sent to it."""
    sent: list[str] = []
    with emulator(name) as address:
        store = DynamoDBStore("bench", region="us-east-1", endpoint_url=address)
        store.create_table()
        for operation in ("BatchWriteItem", "DeleteItem", "PutItem", "UpdateItem"):
            event = f"before-call.dynamodb.{operation}"
            store.client.meta.events.register(event, lambda model, **_: sent.append(model.name))
        yield store, lambda: len(sent)
        store.close()


def publish(name: str, store: ResultStore, writes: Writes, count: int) -> None:
    """Store a run twice, and print a row of the table."""
    report, samples = report_of(count), samples_of(count)
    start = time.perf_counter()
    assert store.put_run(report, samples)
    first = time.perf_counter() - start
    before = writes()
    start = time.perf_counter()
    assert not store.put_run(report, samples)
    again = time.perf_counter() - start
    print(
        f"{name:<10}{count:>10,}{first:>10.2f}{count / first:>10,.0f}{again:>12.2f}"
        f"{writes() - before:>10}"
    )


def first_page(store: ResultStore, run_id: str, query: str) -> list[float]:
    """Call the API repeatedly for a first page of 25 samples; return the milliseconds of each call."""
    event = {
        "rawPath": f"/api/runs/{run_id}/samples",
        "rawQueryString": f"{query}&limit=25",
        "requestContext": {"http": {"method": "GET"}},
    }
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        answer = respond(event, store)
        taken.append(1000 * (time.perf_counter() - start))
        assert answer["statusCode"] == 200, answer["body"]
    return taken


def main() -> None:
    """Measure everything, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000, help="of a run that is published")
    parser.add_argument("--page-of", type=int, default=100_000, help="samples of a run to page in")
    args = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # moto logs every request
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    print("publish      samples         s    rows/s    repeat, s    writes")
    with tempfile.TemporaryDirectory() as folder, sqlite_store(Path(folder)) as (store, writes):
        publish("sqlite", store, writes, args.samples)
    for name in ("moto", "dynalite"):
        if name == "moto" or f"RAY_DETOX_{name.upper()}" in os.environ:
            with dynamodb_store(name) as (store, writes):
                publish(name, store, writes, args.samples)

    print(f"\nfirst page of {args.page_of:,} samples in sqlite  median, ms  slowest, ms")
    with tempfile.TemporaryDirectory() as folder, sqlite_store(Path(folder)) as (store, _):
        report = report_of(args.page_of)
        store.put_run(report, samples_of(args.page_of))
        for title, query in PAGES.items():
            taken = first_page(store, report["run_id"], query)
            print(f"{title:<44}{statistics.median(taken):>10.1f}{max(taken):>13.1f}")


if __name__ == "__main__":
    main()
