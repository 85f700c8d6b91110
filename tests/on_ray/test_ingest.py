"""Ingest with Ray Data: rows read, left out, held out and split into shards."""

import csv
import dataclasses
import json
from collections import Counter

import datasets
import pyarrow as pa
import pytest
import ray
from pyarrow import parquet

from ray_detox.config import ConfigError
from ray_detox.data.files import locate
from ray_detox.data.prompts import prompt_text, unpack_rows
from ray_detox.data.shards import PromptShards, shards_of_worker
from ray_detox.lab import corpus
from ray_detox.recipes.loading import load_config
from ray_detox.records import LeftOutRow, PreparedRow
from ray_detox.stages.ingest import ingest, pack_rows

pytestmark = pytest.mark.ray

ROWS = 103  # and a fifth of it, rounded up, is 21
HELD_OUT = 21
SHARDS = 4


@pytest.fixture(scope="module")
def rows():
    """Rows that ingest keeps."""
    return [row for row in corpus.rows("ppo", 2 * ROWS) if len(row["dialogue"]) > 200][:ROWS]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


class Prepared:
    """The result of `ingest` for some settings, with its shards read as a training worker reads them."""

    def __init__(self, *settings):
        self.config = load_config(
            "lab", [f"data.shards={SHARDS}", "ppo.prompts_per_step=8", *settings]
        )
        data = ingest(self.config, locate(self.config.data))
        self.counts = data.counts
        self.fingerprint = data.fingerprint
        self.identity = data.identity
        self.held_out = data.held_out
        self.shards = [unpack_rows(table.to_pylist()) for table in ray.get(data.shards)]

    @property
    def train(self):
        return [row for shard in self.shards for row in shard]


def ids(rows):
    return [row.prompt_id for row in rows]


def counted(prepared):
    """The counts without the examples, which depend on the order of reading."""
    return dataclasses.replace(prepared.counts, examples={})


def own(rows, *names):
    return [
        (row.prompt_id, row.prompt, row.query_ids, {name: row.columns[name] for name in names})
        for row in rows
    ]


@pytest.fixture(scope="module")
def embedded():
    """The first rows of the embedded corpus, some of them too short."""
    return Prepared(f"data.limit={ROWS}")


@pytest.fixture(scope="module")
def hashed(tmp_path_factory, rows, tiny_t5):
    """The same rows from one file of .jsonl, with the tiny policy's tokenizer."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_jsonl(path, rows)
    return Prepared(f"data.path={path}", f"policy.model={tiny_t5}")


# ---- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_file_gives_the_prompts_that_the_embedded_corpus_gives(tmp_path, embedded, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, corpus.rows("ppo", ROWS))

    found = Prepared(f"data.path={path}")

    assert found.counts == embedded.counts
    assert found.fingerprint == embedded.fingerprint
    assert found.counts.left_out["not over 200 characters"] > 0
    for shard, expected in zip(found.shards, embedded.shards, strict=True):
        assert own(shard, "id", "summary") == own(expected, "id", "summary")
    assert own(found.held_out, "id", "summary") == own(embedded.held_out, "id", "summary")
    if kind != "csv":  # which has no lists
        assert found.held_out == embedded.held_out


def test_a_hub_dataset_gives_the_prompts_that_the_embedded_corpus_gives(embedded, monkeypatch):
    hub = datasets.Dataset.from_list(corpus.rows("ppo", ROWS))
    monkeypatch.setattr("ray_detox.stages.ingest.load_hub", lambda config: hub)

    found = Prepared("data.path=someone/dialogues")

    assert found.counts == embedded.counts
    assert found.shards == embedded.shards
    assert found.held_out == embedded.held_out


def test_a_prompt_is_the_template_around_the_dialogue_and_its_tokens(embedded):
    from transformers import AutoTokenizer

    from ray_detox import lab

    tokenizer = AutoTokenizer.from_pretrained(lab.T5)
    dialogues = {row["id"]: row["dialogue"] for row in corpus.rows("ppo", ROWS)}

    for row in embedded.train[:5] + embedded.held_out[:5]:
        text = prompt_text(dialogues[row.columns["id"]], embedded.config.data)
        assert row.prompt == text
        assert row.query_ids == tokenizer(text)["input_ids"]


def test_a_csv_column_of_digits_and_then_of_words_is_read(tmp_path, rows, tiny_t5):
    path = tmp_path / "rows.csv"
    mixed = [
        {"id": i if i < 100 else f"x{i}", "dialogue": row["dialogue"], "summary": str(i)}
        for i, row in enumerate(rows)
    ]
    write_csv(path, [{"id": 10**6, "dialogue": "12", "summary": "3" * 200}] * 8000 + mixed)

    found = Prepared(f"data.path={path}", f"policy.model={tiny_t5}")

    assert found.counts.left_out == {"not over 200 characters": 8000}
    assert {row.columns["summary"] for row in found.train + found.held_out} == set(
        map(str, range(ROWS))
    )


def test_prepared_rows_are_restored_from_their_table():
    prepared = [
        PreparedRow(
            "00ff", "Sum up: ü", [3, 1], {"summary": None, "facts": ["one", 2], "id": "a"}, 0, ()
        ),
        PreparedRow("01ff", "Sum up: b", [4, 5, 1], {"dialogue": "b\ud800"}, 0, ()),
    ]

    table = pack_rows([*prepared, LeftOutRow("'c'", "empty dialogue")])

    *usable, left_out = table.to_pylist()
    assert unpack_rows(usable) == prepared
    assert (left_out["name"], left_out["left_out"]) == ("'c'", "empty dialogue")
    assert table["left_out"].null_count == 2


# ---- rows left out --------------------------------------------------------------------------


def test_rows_left_out_are_counted_and_named_by_reason(tmp_path, rows, tiny_t5):
    path = tmp_path / "rows.jsonl"
    text = rows[0]["dialogue"]
    bad = {
        "no dialogue": [{"id": "a", "text": text}, {"id": "b", "dialogue": None}],
        "empty dialogue": [{"id": "c", "dialogue": ""}, {"id": "d", "dialogue": " \n"}],
        "dialogue is not text": [{"id": f"e{i}", "dialogue": i} for i in range(5)],
        "dialogue is not valid Unicode": [{"id": "f", "dialogue": "\ud800" + text}],
        "not over 200 characters": [{"id": "g", "dialogue": text[:200]}],
        "over 1000 characters": [{"id": "h", "dialogue": "x" * 1001}],
        "over 300 prompt tokens": [{"id": "i", "dialogue": "w " * 400}],
    }
    lines = [json.dumps(row) for row in rows]
    for position, row in enumerate(row for some in bad.values() for row in some):
        lines.insert(7 * position, json.dumps(row))
    lines[50:50] = ['{"id": "j", "dialogue": "half a li', "[]", "", "text"]
    whole = "\n".join(lines).encode() + b"\n"
    path.write_bytes(
        whole + json.dumps({"dialogue": "cafe " + text}).encode().replace(b"fe", b"f\xe9")
    )

    found = Prepared(f"data.path={path}", f"policy.model={tiny_t5}", "data.max_prompt_tokens=300")

    counts = found.counts
    expected = {reason: len(some) for reason, some in bad.items()}
    expected["not a JSON object"] = 3  # the empty line does not count
    latin_1 = next(reason for reason in counts.left_out if "iconv" in reason)
    expected[latin_1] = 1
    assert counts.left_out == expected
    assert counts.read == ROWS + sum(expected.values())
    assert counts.train + counts.held_out == ROWS
    assert counts.examples["empty dialogue"] == ["'c'", "'d'"]
    assert counts.examples["dialogue is not text"] == ["'e0'", "'e1'", "'e2'"]
    assert counts.examples["over 300 prompt tokens"] == ["'i'"]
    assert {row.columns["id"] for row in found.train + found.held_out} == {
        row["id"] for row in rows
    }


def test_too_few_rows_are_refused_with_their_counts(tmp_path, rows, tiny_t5):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [*rows[:4], {"dialogue": "short", "summary": ""}])

    with pytest.raises(ConfigError) as caught:
        Prepared(f"data.path={path}", f"policy.model={tiny_t5}")

    sentence = str(caught.value)
    assert "Of 5 rows" in sentence
    assert "3 are left to train on and 1 to hold out (1 not over 200 characters)" in sentence
    assert "expected at least 4 (data.shards) and 2" in sentence


# ---- the split -------------------------------------------------------------------------------


def test_order_and_number_of_files_do_not_change_the_hashed_split(tmp_path, rows, tiny_t5, hashed):
    shuffled = rows[60:] + rows[:60][::-1]
    for part in range(5):
        write_jsonl(tmp_path / f"{part}.jsonl", shuffled[part::5])

    found = Prepared(f"data.path={tmp_path}", f"policy.model={tiny_t5}")

    assert counted(found) == counted(hashed)
    assert found.shards == hashed.shards
    assert found.held_out == hashed.held_out
    assert found.identity == hashed.identity


def test_the_identity_of_the_data_has_the_split_and_the_other_columns(tmp_path, rows, tiny_t5):
    words = [f"policy.model={tiny_t5}", "data.held_out_rows=last"]
    other = [
        row | {"summary": "Something else."} if i == len(rows) - 1 else row
        for i, row in enumerate(rows)
    ]
    found = []
    for name, content in (("a", rows), ("b", rows[::-1]), ("c", other)):
        write_jsonl(tmp_path / f"{name}.jsonl", content)
        found.append(Prepared(f"data.path={tmp_path}/{name}.jsonl", *words).identity)

    first, reversed_rows, other_summary = found
    differs = lambda identity: {name for name in first if identity[name] != first[name]}
    (held_out,) = (name for name in first if name.endswith("held-out prompts"))
    assert differs(reversed_rows) == {"prompts to train on", held_out}
    assert differs(other_summary) == {held_out}


def test_shards_are_disjoint_of_equal_length_and_hold_every_row(hashed, rows):
    sizes = [len(shard) for shard in hashed.shards]

    assert len(sizes) == SHARDS
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == hashed.counts.train
    everything = ids(hashed.train) + ids(hashed.held_out)
    assert len(everything) == len(set(everything)) == ROWS
    assert {row.columns["id"] for row in hashed.train + hashed.held_out} == {
        row["id"] for row in rows
    }


def test_a_fifth_rounded_up_is_held_out(hashed):
    assert hashed.counts.held_out == len(hashed.held_out) == HELD_OUT
    assert hashed.counts.train == ROWS - HELD_OUT


def test_at_most_the_requested_number_of_held_out_rows_is_kept(tmp_path, rows, tiny_t5, hashed):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)

    found = Prepared(f"data.path={path}", f"policy.model={tiny_t5}", "evaluate.prompts=5")

    assert found.held_out == hashed.held_out[:5]
    assert counted(found) == counted(hashed)


@pytest.mark.parametrize("kind, parts", [("jsonl", 1), ("csv", 5), ("parquet", 5)])
def test_the_last_fifth_of_the_files_is_held_out_on_request(
    tmp_path, rows, tiny_t5, kind, parts
):  # fmt: skip
    bounds = [ROWS * part // parts for part in range(parts + 1)]
    for part in range(parts):
        WRITERS[kind](tmp_path / f"{part}.{kind}", rows[bounds[part] : bounds[part + 1]])

    found = Prepared(f"data.path={tmp_path}", f"policy.model={tiny_t5}", "data.held_out_rows=last")

    first, last = rows[:-HELD_OUT], rows[-HELD_OUT:]
    assert {row.columns["id"] for row in found.train} == {row["id"] for row in first}
    assert {row.columns["id"] for row in found.held_out} == {row["id"] for row in last}
    assert ids(found.train) == sorted(ids(found.train))
    assert ids(found.held_out) == sorted(ids(found.held_out))


def test_copies_of_a_dialogue_are_held_out_together(tmp_path, rows, tiny_t5):
    copies = [row | {"summary": text} for row in rows[:50] for text in ("a", "b", "c")]
    write_jsonl(tmp_path / "one.jsonl", copies)
    write_jsonl(tmp_path / "two.jsonl", copies[::-1])
    settings = [f"policy.model={tiny_t5}", "data.held_out_fraction=0.21"]

    # A fraction of 0.21 of 150 rows is 32 of them, which would cut a dialogue in three
    one, two = (
        Prepared(f"data.path={tmp_path}/{name}.jsonl", *settings) for name in ("one", "two")
    )

    assert not set(ids(one.train)) & set(ids(one.held_out))
    assert counted(one) == counted(two)
    assert (one.counts.train, one.counts.held_out) == (117, 33)
    assert one.shards == two.shards
    assert one.held_out == two.held_out
    numbered = Counter((row.prompt_id, row.copy) for row in one.train)
    assert max(numbered.values()) == 1, "copies are numbered, also across shards"
    assert Counter(row.copy for row in one.train).keys() == {0, 1, 2}


def test_a_prompt_that_the_data_repeat_is_measured_once_with_all_its_references(
    tmp_path, rows, tiny_t5
):
    copies = [row | {"summary": text} for row in rows[:50] for text in ("a", "b", "b")]
    write_jsonl(tmp_path / "rows.jsonl", copies)

    found = Prepared(
        f"data.path={tmp_path}/rows.jsonl",
        f"policy.model={tiny_t5}",
        "data.held_out_fraction=0.21",
        "evaluate.prompts=7",
    )

    assert (found.counts.held_out, found.counts.repeated) == (33, 100)
    assert len(set(ids(found.held_out))) == len(found.held_out) == 7
    for row in found.held_out:
        assert (row.columns["summary"], row.more_references, row.copy) == ("a", ("b",), 0)


# ---- prompts of the workers ------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_get_the_same_prompts_as_one(hashed, workers):
    alone = PromptShards(hashed.config, dict(enumerate(hashed.shards)), pad_id=0)
    group = [
        PromptShards(
            hashed.config,
            {shard: hashed.shards[shard] for shard in shards_of_worker(SHARDS, rank, workers)},
            pad_id=0,
        )
        for rank in range(workers)
    ]

    # 20 or 21 rows in a shard and two from each per step: well into the second epoch
    for step in range(15):
        expected = alone.batch(step)
        shares = [worker.batch(step) for worker in group]
        assert [name for share in shares for name in share.ids] == expected.ids
        assert [len(share) for share in shares] == [8 // workers] * workers
        assert [worker.first_row for worker in group] == list(range(0, 8, 8 // workers))


def test_an_epoch_covers_every_prompt_of_a_shard_once(hashed):
    alone = PromptShards(hashed.config, dict(enumerate(hashed.shards)), pad_id=0)
    shortest = min(len(shard) for shard in hashed.shards)

    seen = [name for step in range(shortest // 2) for name in alone.batch(step).ids]

    assert len(seen) == len(set(seen))
    assert set(seen) <= set(ids(hashed.train))
