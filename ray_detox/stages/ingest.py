"""Ingest with Ray Data: read the files, prepare the prompts, and split them into shards.

    read -> prepare (filter, prompt text, tokens; in parallel) -> count the rows left out
         -> split into train and held out -> sort train by prompt id -> shards

The split does not depend on the order in which files, blocks or tasks finish: it follows the hash of
each row's text (or, if the settings say so, the order in the files). Everything is materialised before
training starts, because a lazy dataset would wait for ever for CPUs that the worker group holds.
"""

import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.expressions import col

from ray_detox.config import ConfigError, DataConfig, RunConfig
from ray_detox.data.files import LAB_ROWS, Source, load_hub
from ray_detox.data.prompts import (
    held_out_count,
    merge_repeated,
    number_copies,
    prepare,
    unpack_row,
)
from ray_detox.data.reading import read_file
from ray_detox.lab import corpus
from ray_detox.models.sources import local_folder
from ray_detox.records import LeftOutRow, PreparedRow

EXAMPLES_SHOWN = 3
"""Names of rows to report for each reason to leave rows out."""

ROWS_PER_BLOCK = 4000
"""Rows that are worth a task of their own."""

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("query_ids", pa.list_(pa.int32())),
        # The row's own columns as JSON: rows of one file may differ in names and types.
        ("columns", pa.string()),
        ("left_out", pa.string()),
        ("name", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How many rows were read, left out, and used for what."""

    read: int
    left_out: dict[str, int]
    """Rows left out, by reason."""
    examples: dict[str, list[str]]
    """Names of up to `EXAMPLES_SHOWN` rows left out, by reason."""
    train: int
    held_out: int
    repeated: int
    """Rows used whose prompt is that of an earlier row, too."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """Prompts for training and for the evaluation."""

    shards: list[Any]
    """References to `data.shards` Arrow tables; their lengths differ by at most one row."""
    held_out: list[PreparedRow]
    """Different prompts for the evaluation, at most `evaluate.prompts`."""
    counts: RowCounts
    fingerprint: str
    """Content hash of all prompts, trained on and held out."""
    trained_on: str
    """Content hash of the rows to train on, with all their columns."""

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints by name, for the record of the run.

        The number of held-out rows is in the name: with another `evaluate.prompts` they are others.
        """
        held_out = hashlib.sha256()
        for row in self.held_out:
            content = [row.prompt_id, row.columns, *row.more_references]
            held_out.update(json.dumps(content, default=str).encode())
        return {
            "prompts": self.fingerprint,
            "prompts to train on": self.trained_on,
            f"{len(self.held_out)} held-out prompts": f"sha256:{held_out.hexdigest()}",
        }


def ingest(config: RunConfig, source: Source) -> Ingested:
    """Read, filter and tokenise the prompts, and split them into shards and held-out rows.

    Raises:
        ConfigError: too few rows are left.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Ray Data prints plans and tips, several lines for each operation, between our own lines.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = config.data

    # One task per CPU, even if all rows are in a single file. But no more tasks than are worth it: a
    # process takes as long to load a tokenizer as to prepare some thousand rows.
    at_most = [n for n in (data.limit, LAB_ROWS if source.kind == "lab" else None) if n]
    cpus = int(ray.cluster_resources().get("CPU", 2))
    blocks = max(1, min([cpus - 1, *(n // ROWS_PER_BLOCK for n in at_most)]))
    # Tasks on few rows take milliseconds, and a process for them takes seconds to start: one at a
    # time, they share a process.
    is_small = any(n < 2 * ROWS_PER_BLOCK for n in at_most)
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        cpu=1 if is_small else None
    )
    rows = read(source, data)
    if data.limit is not None:
        rows = rows.limit(data.limit)
    rows = rows.repartition(blocks) if len(source.paths) < blocks else rows
    prepared = rows.map_batches(
        prepare_batch,
        fn_kwargs={"config": config, "as_json": source.kind not in ("lab", "hub")},
        batch_size=1024,
        batch_format="pyarrow",
    ).materialize()

    summary = _summarise(prepared)
    read_count, left_out = summary.read, summary.left_out
    kept = prepared.filter(expr=col("left_out").is_null()).select_columns(
        ["prompt_id", "prompt", "query_ids", "columns"]
    )
    # Sorted by the other columns as well, so that the order of equal dialogues is defined.
    order = ["prompt_id", "columns"]
    if data.held_out_rows == "hashed":
        kept = _sorted(kept, order, blocks=prepared.num_blocks())
    kept = kept.materialize()
    count = kept.count()
    held = held_out_count(count, data.held_out_fraction)
    _check_enough(count - held, held, read_count, left_out, data)
    train, held_out = kept.split_at_indices([count - held])
    if data.held_out_rows == "hashed":
        # All copies of a dialogue are held out together, or the evaluation would measure prompts
        # that the policy was trained on.
        first = held_out.take(1)[0]["prompt_id"]
        held += train.filter(expr=col("prompt_id") == first).count()
        _check_enough(count - held, held, read_count, left_out, data)
        train, held_out = kept.split_at_indices([count - held])
    else:
        train, held_out = (
            _sorted(part, order, part.num_blocks()).materialize() for part in (train, held_out)
        )
    bounds = [round((count - held) * shard / data.shards) for shard in range(1, data.shards)]
    seen: Counter[str] = Counter()
    content = hashlib.sha256()
    return Ingested(
        shards=[
            _hold(shard, seen, content)
            for shard in (train.split_at_indices(bounds) if bounds else [train])
        ],
        held_out=merge_repeated(
            map(unpack_row, held_out.iter_rows()), data, at_most=config.evaluate.prompts
        ),
        counts=RowCounts(
            read_count, left_out, summary.examples, count - held, held, summary.repeated
        ),
        fingerprint=summary.fingerprint,
        trained_on=f"sha256:{content.hexdigest()}",
    )


def _sorted(rows: ray.data.Dataset, order: Sequence[str], blocks: int) -> ray.data.Dataset:
    """Sort rows by columns; a single block where it is, since a distributed sort starts two processes."""
    if blocks > 1:
        return rows.sort(list(order))
    sort = lambda block: block.sort_by([(name, "ascending") for name in order])
    return rows.map_batches(sort, batch_size=None, batch_format="pyarrow")


def _hold(shard: ray.data.Dataset, seen: Counter[str], content: "hashlib._Hash") -> Any:
    """Copy a shard to the driver's node as one table, so that losing another node cannot lose it.

    Args:
        shard: prepared rows.
        seen: rows of earlier shards by prompt; the table's column `copy` continues their count.
        content: hash of the rows of earlier shards, which continues with these.
    """
    table = pa.concat_tables(ray.get(shard.to_arrow_refs()))
    prompt_ids = table["prompt_id"].to_pylist()
    copies = number_copies(prompt_ids, seen)
    for row in zip(prompt_ids, table["columns"].to_pylist(), strict=True):
        content.update(json.dumps(row).encode())
    return ray.put(table.append_column("copy", pa.array(copies, pa.int32())))


def read(source: Source, config: DataConfig) -> ray.data.Dataset:
    """Return the rows of a source as a Ray dataset; rows of files are JSON text.

    Ray Data's own readers infer one schema for a file or a folder, so that a single odd row would make
    them fail or would change the types of the others.
    """
    if source.kind == "lab":
        return ray.data.from_arrow(pa.Table.from_pylist(corpus.rows("ppo", LAB_ROWS)))
    if source.kind == "hub":
        return ray.data.from_arrow(load_hub(config).with_format("arrow")[:])
    files = ray.data.from_items(
        [{"path": path} for path in source.paths], override_num_blocks=len(source.paths)
    )
    return files.map_batches(
        read_as_json,
        fn_kwargs={"kind": source.kind, "config": config},
        batch_size=1,
        batch_format="pyarrow",
    )


def read_as_json(paths: pa.Table, kind: str, config: DataConfig) -> Iterator[pa.Table]:
    """Read the rows of files as JSON text; runs in Ray tasks."""
    for path in paths["path"].to_pylist():
        rows = read_file(path, kind, config)
        while some := [json.dumps(row, default=str) for row in itertools.islice(rows, 4096)]:
            yield pa.table({"row": some})


def prepare_batch(batch: pa.Table, config: RunConfig, as_json: bool) -> pa.Table:
    """Prepare a batch of raw rows, and return a table of `SCHEMA`; runs in Ray tasks."""
    rows = batch.to_pylist()
    if as_json:
        rows = [json.loads(row["row"]) for row in rows]
    return pack_rows(prepare(rows, config.data, _tokenizer(config)))


def pack_rows(rows: Sequence[PreparedRow | LeftOutRow]) -> pa.Table:
    """Convert prepared rows to a table of `SCHEMA`."""
    return pa.Table.from_pylist(
        [
            {"left_out": row.reason, "name": row.name}
            if isinstance(row, LeftOutRow)
            else {
                "prompt_id": row.prompt_id,
                "prompt": row.prompt,
                "query_ids": row.query_ids,
                "columns": json.dumps(row.columns),
            }
            for row in rows
        ],
        schema=SCHEMA,
    )


@functools.lru_cache(maxsize=1)
def _tokenizer_of(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    folder = local_folder(model, revision, "policy.model", weights=False)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _tokenizer(config: RunConfig) -> Any:
    return _tokenizer_of(config.policy.model, config.policy.revision)


@dataclass(frozen=True, slots=True)
class _Summary:
    """What the driver has to know of all rows."""

    read: int
    left_out: dict[str, int]
    examples: dict[str, list[str]]
    repeated: int
    fingerprint: str


def _summarise(prepared: ray.data.Dataset) -> _Summary:
    """Count the rows, and sum the prompt ids of those kept.

    The ids are hashes: the same prompts in any order give the same sum, of which 47 bits are kept.
    """
    read = total = repeated = 0
    seen = set[int]()
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    names = ["prompt_id", "left_out", "name"]
    light = prepared.select_columns(names)
    for batch in light.iter_batches(batch_size=4096, batch_format="pyarrow"):
        read += len(batch)
        for prompt_id, reason, name in zip(*(batch[c].to_pylist() for c in names), strict=True):
            if reason is None:
                number = int(prompt_id, 16)
                total = (total + number) % 2**47
                repeated += number in seen
                seen.add(number)
                continue
            counts[reason] = counts.get(reason, 0) + 1
            if len(examples.setdefault(reason, [])) < EXAMPLES_SHOWN:
                examples[reason].append(name)
    return _Summary(
        read,
        dict(sorted(counts.items())),
        dict(sorted(examples.items())),
        repeated,
        f"{total:012x}",
    )


def _check_enough(
    train: int, held: int, read_count: int, left_out: Mapping[str, int], config: DataConfig
) -> None:
    if train >= config.shards and held >= 2:
        return
    why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "none left out"
    raise ConfigError(
        f"Of {read_count:,} rows of data.path={config.path}, {train:,} are left to train on and "
        f"{held:,} to hold out ({why}); expected at least {config.shards} (data.shards) and 2. "
        "Use more data, widen data.min_chars and data.max_chars, or lower data.shards."
    )
