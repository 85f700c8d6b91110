"""Ray Data: files to prompts, split once and for good.

    read -> prepare (filter, prompt text, tokens; in parallel) -> count what is left out
         -> split into train and held out -> sort train by prompt id -> shards

The order in which files, blocks or tasks come in decides nothing: rows are split and dealt by
the hash of their text (or, on request, in file order). Everything is materialised before training
starts, because a lazy dataset inside a worker group that holds every CPU would wait for ever.
"""

import functools
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.datasource import FileBasedDatasource
from ray.data.expressions import col

from ray_detox.config import ConfigError, DataConfig, RunConfig
from ray_detox.data.files import LAB_ROWS, Source, load_hub, read_rows
from ray_detox.data.prompts import held_out_count, prepare, unpack_rows
from ray_detox.models.sources import local_folder
from ray_detox.records import LeftOutRow, PreparedRow

EXAMPLES_SHOWN = 3

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("query_ids", pa.list_(pa.int32())),
        # The row's own columns as JSON: rows of one file need not agree on names or types.
        ("columns", pa.string()),
        ("left_out", pa.string()),
        ("name", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What became of every row that was read."""

    read: int
    left_out: dict[str, int]
    """Rows left out, by reason."""
    examples: dict[str, list[str]]
    """Names of a few rows left out, by reason."""
    train: int
    held_out: int


@dataclass(frozen=True, slots=True)
class Ingested:
    """Prompts, ready for training and for the evaluation."""

    shards: list[Any]
    """References to `data.shards` Arrow tables of equal length, give or take one row."""
    held_out: list[PreparedRow]
    """Rows for the evaluation, at most `evaluate.prompts`."""
    counts: RowCounts
    fingerprint: str
    """Tells these prompts, trained on and held out, from others."""


def ingest(config: RunConfig, source: Source) -> Ingested:
    """Read, filter, tokenise, split and deal the prompts.

    Raises:
        ConfigError: too few rows are left.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Its plans and tips, several lines for each operation, would drown our own.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = config.data

    # One task per CPU, also where everything is in a single file; but a process that loads a
    # tokenizer takes as long as some thousand rows.
    at_most = [n for n in (data.limit, LAB_ROWS if source.kind == "lab" else None) if n]
    cpus = int(ray.cluster_resources().get("CPU", 2))
    blocks = max(1, min([cpus - 1, *(n // 4000 for n in at_most)]))
    rows = read(source, data)
    if data.limit is not None:
        rows = rows.limit(data.limit)
    rows = rows.repartition(blocks) if len(source.paths) < blocks else rows
    prepared = rows.map_batches(
        prepare_batch,
        fn_kwargs={"config": config, "as_json": source.kind in ("jsonl", "csv")},
        batch_size=1024,
        batch_format="pyarrow",
    ).materialize()

    read_count = prepared.count()
    left_out, examples = _count_left_out(prepared)
    kept = prepared.filter(expr=col("left_out").is_null()).select_columns(
        ["prompt_id", "prompt", "query_ids", "columns"]
    )
    # The other columns settle the order of equal dialogues.
    order = ["prompt_id", "columns"]
    if data.held_out_rows == "hashed":
        kept = kept.sort(order)
    kept = kept.materialize()
    count = kept.count()
    held = held_out_count(count, data.held_out_fraction)
    _check_enough(count - held, held, read_count, left_out, data)
    train, held_out = kept.split_at_indices([count - held])
    if data.held_out_rows == "hashed":
        # A dialogue that comes several times is held out as a whole.
        first = held_out.take(1)[0]["prompt_id"]
        held += train.filter(expr=col("prompt_id") == first).count()
        _check_enough(count - held, held, read_count, left_out, data)
        train, held_out = kept.split_at_indices([count - held])
    else:
        train, held_out = train.sort(order).materialize(), held_out.sort(order)
    bounds = [round((count - held) * shard / data.shards) for shard in range(1, data.shards)]
    return Ingested(
        shards=[_hold(shard) for shard in (train.split_at_indices(bounds) if bounds else [train])],
        held_out=unpack_rows(held_out.take(config.evaluate.prompts)),
        counts=RowCounts(read_count, left_out, examples, count - held, held),
        fingerprint=_fingerprint(kept),
    )


def _hold(shard: ray.data.Dataset) -> Any:
    """A shard as one table in the store of the driver's node: no other node's loss takes it away."""
    return ray.put(pa.concat_tables(ray.get(shard.to_arrow_refs())))


def read(source: Source, config: DataConfig) -> ray.data.Dataset:
    """The rows of a source as a Ray dataset; those of .jsonl and .csv as JSON, to be parsed later."""
    paths = list(source.paths)
    if source.kind == "lab":
        from ray_detox.lab import corpus

        return ray.data.from_arrow(pa.Table.from_pylist(corpus.rows("ppo", LAB_ROWS)))
    if source.kind == "hub":
        return ray.data.from_arrow(load_hub(config).with_format("arrow")[:])
    if source.kind == "parquet":
        return ray.data.read_parquet(paths)
    return ray.data.read_datasource(_TextFiles(paths, kind=source.kind))


class _TextFiles(FileBasedDatasource):
    """Rows of .jsonl and .csv files as JSON: one odd row must not fail, or change, the others."""

    def __init__(self, paths: list[str], kind: str) -> None:
        super().__init__(paths)
        self._kind = kind

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        rows = read_rows(f, self._kind)
        while some := [json.dumps(row) for row in itertools.islice(rows, 4096)]:
            yield pa.table({"row": some})


def prepare_batch(batch: pa.Table, config: RunConfig, as_json: bool) -> pa.Table:
    """A batch of raw rows as `SCHEMA`; runs in Ray tasks."""
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
    return AutoTokenizer.from_pretrained(folder)


def _tokenizer(config: RunConfig) -> Any:
    return _tokenizer_of(config.policy.model, config.policy.revision)


def _fingerprint(prompts: ray.data.Dataset) -> str:
    """A sum of the ids' hashes: the same for the same prompts in any order."""

    def sum_of(batch: pa.Table) -> pa.Table:
        total = sum(int(prompt_id, 16) for prompt_id in batch["prompt_id"].to_pylist())
        # 47 bits: the sum of 65,000 batches still fits into 63.
        return pa.table({"sum": pa.array([total % 2**47], pa.int64())})

    sums = prompts.select_columns(["prompt_id"]).map_batches(
        sum_of, batch_size=None, batch_format="pyarrow"
    )
    return f"{(sums.sum('sum') or 0) % 2**47:012x}"


def _count_left_out(
    prepared: ray.data.Dataset,
) -> tuple[dict[str, int], dict[str, list[str]]]:
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    bad = prepared.filter(expr=col("left_out").is_not_null()).select_columns(["left_out", "name"])
    for batch in bad.iter_batches(batch_size=4096, batch_format="pyarrow"):
        for reason, name in zip(*(batch[c].to_pylist() for c in ("left_out", "name")), strict=True):
            counts[reason] = counts.get(reason, 0) + 1
            if len(examples.setdefault(reason, [])) < EXAMPLES_SHOWN:
                examples[reason].append(name)
    return dict(sorted(counts.items())), dict(sorted(examples.items()))


def _check_enough(
    train: int, held: int, read_count: int, left_out: Mapping[str, int], config: DataConfig
) -> None:
    if train >= config.shards and held >= 2:
        return
    why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "none left out"
    raise ConfigError(
        f"Of {read_count:,} rows of data.path={config.path}, {train:,} are left to train on and "
        f"{held:,} to hold out ({why}); expected at least {config.shards} (data.shards) and 2. "
        "Give more data, widen data.min_chars and data.max_chars, or lower data.shards."
    )
