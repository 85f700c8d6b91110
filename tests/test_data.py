"""The sources that `data.path` may name, and the message for each unusable one."""

import bz2
import csv
import datetime
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.files import Source, check_rows, load_hub, locate, peek
from ray_detox.data.prompts import reason_to_leave_out
from ray_detox.data.reading import parse_json_row
from ray_detox.stages.ingest import read_as_json

LONG = "#Person1#: Did you see the match?\n#Person2#: I did, and what a match it was!\n" * 4
QUOTED = f'He said: "no, never", and left;\r\n{LONG}'


def make_rows(*dialogues, **more):
    return [
        {"id": str(i), "dialogue": dialogue, "summary": f"summary {i}", **more}
        for i, dialogue in enumerate(dialogues)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture(params=sorted(WRITERS))
def kind(request):
    return request.param


@pytest.fixture
def write(tmp_path, kind):
    """`write(rows)`: a data config for a file of `kind` with these rows."""

    def make(rows, **settings):
        path = tmp_path / f"rows.{kind}"
        WRITERS[kind](path, rows)
        return DataConfig(path=str(path), **settings)

    return make


def check(config):
    check_rows(locate(config), config)


def error_of(config):
    """Return the one-line message of the error that `check` raises."""
    with pytest.raises(ConfigError) as caught:
        check(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- every kind of file ------------------------------------------------------------------------


def test_the_kind_of_a_file_follows_from_its_suffix(write, kind, tmp_path):
    config = write(make_rows(LONG))

    assert locate(config) == Source(kind, (str(tmp_path / f"rows.{kind}"),))


def test_rows_are_read_as_they_were_written(write):
    rows = make_rows(LONG, QUOTED, "short")

    config = write(rows)

    assert list(peek(locate(config), config)) == rows


def test_one_usable_row_is_enough(write):
    check(write(make_rows("short", "", LONG)))


def test_a_missing_dialogue_column_is_reported_with_the_existing_columns(write):
    message = error_of(write(make_rows(LONG), dialogue_column="conversation"))

    assert "has no column 'conversation'; its columns are id, dialogue, summary" in message
    assert "Set data.dialogue_column" in message


def test_a_missing_summary_column_is_reported_with_a_remedy(write):
    message = error_of(write(make_rows(LONG), summary_column="highlights"))

    assert "has no column 'highlights'; its columns are id, dialogue, summary" in message
    assert "or to null" in message


def test_summaries_are_optional_if_summary_column_is_null(write):
    check(write([{"dialogue": LONG}], summary_column=None))


def test_a_filter_that_leaves_no_row_reports_the_reasons_and_counts(write):
    message = error_of(write(make_rows("short", "shorter", " ", LONG * 5)))

    assert "None of the 4 rows" in message
    assert "2 not over 200 characters" in message
    assert "1 empty dialogue" in message
    assert "1 over 1000 characters" in message
    assert "Widen data.min_chars and data.max_chars" in message


def test_rows_beyond_the_limit_are_not_read(write):
    message = error_of(write(make_rows("short", "short", LONG), limit=2))

    assert "None of the 2 rows" in message


# ---- faults of a single kind of file -----------------------------------------------------------


def test_lines_that_are_not_json_objects_become_empty_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"dialogue": LONG, "summary": "s"})
    path.write_text(f'{{"dialogue": \n[1, 2]\n"text"\n\n{good}\n', encoding="utf-8")
    config = DataConfig(path=str(path))

    rows = list(peek(locate(config), config))

    assert rows == [{}, {}, {}, {"dialogue": LONG, "summary": "s"}]
    check(config)


@pytest.mark.parametrize("line", ["{", "null", "3", '["a"]', "NaN", ""])
def test_a_line_that_is_not_a_json_object_is_an_empty_row(line):
    assert parse_json_row(line) == {}


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("jsonl", "not json\nat all\n", "a JSON object in each line"),
        ("csv", "id,dialogue\n1,a,b\n2,c,d\n", "as many fields in each row as in the first line"),
    ],
)
def test_a_file_without_a_readable_row_is_rejected_with_the_expected_format(
    tmp_path, kind, content, expected
):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)

    message = error_of(DataConfig(path=str(path)))

    assert f"None of the 2 rows of data.path={path} can be read as {kind}" in message
    assert expected in message


def test_dialogues_that_are_not_text_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, make_rows(12, 3.5, ["a", "b"], {"text": LONG}))

    assert "4 dialogue is not text" in error_of(DataConfig(path=str(path)))


def test_text_with_lone_surrogates_is_counted_as_invalid_unicode(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"dialogue": "\ud800" + LONG}) + "\n")

    assert "1 dialogue is not valid Unicode" in error_of(DataConfig(path=str(path)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_dialogue_in_another_encoding_is_counted_as_invalid_unicode(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, make_rows("cafe " + LONG))
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))

    assert "1 dialogue is not valid Unicode" in error_of(DataConfig(path=str(path)))


def test_an_invalid_parquet_file_is_rejected(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("dialogue\n")

    assert "cannot be read as parquet" in error_of(DataConfig(path=str(path)))


def test_a_csv_dialogue_of_digits_is_text(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, make_rows("12", LONG))
    config = DataConfig(path=str(path))

    assert next(iter(peek(locate(config), config)))["dialogue"] == "12"


@pytest.mark.parametrize("row", ["a,b", "a,b,c,d"])
def test_a_csv_row_with_another_number_of_fields_becomes_an_empty_row(tmp_path, row):
    path = tmp_path / "rows.csv"
    path.write_text(f'id,dialogue,summary\n1,"two\nlines",short\n{row}\n')
    config = DataConfig(path=str(path))

    rows = list(peek(locate(config), config))

    assert rows == [{"id": "1", "dialogue": "two\nlines", "summary": "short"}, {}]


def test_a_csv_field_may_be_longer_than_the_default_limit_of_the_csv_module(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, make_rows(LONG, transcript="x" * 200_000))

    check(DataConfig(path=str(path)))


def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    odd = LONG + "\u2028 \x85 \u2029"
    path.write_text(json.dumps({"dialogue": odd, "summary": ""}, ensure_ascii=False) + "\r\n")
    config = DataConfig(path=str(path))

    assert [row["dialogue"] for row in peek(locate(config), config)] == [odd]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_ignored(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"dialogue": LONG, "summary": "s"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    check(DataConfig(path=str(path)))


@pytest.mark.parametrize(("kind", "content"), [("jsonl", ""), ("csv", ""), ("csv", "dialogue\n")])
def test_a_file_without_rows_is_rejected(tmp_path, kind, content):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)

    assert "holds no rows" in error_of(DataConfig(path=str(path)))


# ---- folders and names -------------------------------------------------------------------------


def test_a_folder_gives_its_data_files_sorted_by_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write_jsonl(tmp_path / name, make_rows(f"{name} {LONG}"))
    (tmp_path / "README.md").write_text("not data")
    config = DataConfig(path=str(tmp_path))

    source = locate(config)

    names = ("a.jsonl", "b.jsonl", "c.json")
    assert source == Source("jsonl", tuple(str(tmp_path / name) for name in names))
    assert [row["dialogue"][:7] for row in peek(source, config)] == [
        "a.jsonl",
        "b.jsonl",
        "c.json ",
    ]


def test_a_folder_with_two_kinds_of_files_is_rejected(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_rows(LONG))
    write_csv(tmp_path / "b.csv", make_rows(LONG))

    message = error_of(DataConfig(path=str(tmp_path)))

    assert "holds csv and jsonl files" in message
    assert "keep one kind of file" in message


def test_an_empty_folder_is_rejected(tmp_path):
    assert "expected .jsonl, .csv or .parquet files there" in error_of(
        DataConfig(path=str(tmp_path))
    )


def test_a_file_of_an_unsupported_kind_is_rejected(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text("")

    assert "expected .jsonl, .csv or .parquet" in error_of(DataConfig(path=str(path)))


@pytest.mark.parametrize("name", ["/nowhere/rows.parquet", "./rows.jsonl", "rows.csv", "~/x/y/z"])
def test_a_missing_path_is_rejected_and_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    message = error_of(DataConfig(path=name))

    assert repr(name) in message
    assert "no such file is here" in message


@pytest.mark.parametrize("name", ["knkarthick/dialogsum", "dialogsum"])
def test_a_name_that_is_not_a_path_is_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert locate(DataConfig(path=name)) == Source("hub")


def test_the_name_lab_is_the_embedded_corpus():
    assert locate(DataConfig(path="lab")) == Source("lab")


# ---- as other programs write files -------------------------------------------------------------


def read(path, **settings):
    config = DataConfig(path=str(path), **settings)
    check(config)
    return list(peek(locate(config), config))


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_compressed_text_is_read(tmp_path, kind, suffix):
    rows = make_rows(LONG, QUOTED)
    plain = tmp_path / "plain"
    WRITERS[kind](plain, rows)
    packed = tmp_path / f"rows.{kind}.{suffix}"
    codecs = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    zstd = lambda content: pa.compress(content, codec="zstd", asbytes=True)
    packed.write_bytes(codecs.get(suffix, zstd)(plain.read_bytes()))

    assert read(packed) == rows

    packed.write_bytes(packed.read_bytes()[: len(packed.read_bytes()) // 2])
    assert f"{packed} cannot be read as {kind}" in error_of(DataConfig(path=str(packed)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_text_in_other_unicode_encodings_is_read(tmp_path, kind, encoding):
    rows = make_rows(LONG + " déjà vu 😀")
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, rows)
    path.write_bytes(path.read_text("utf-8").encode(encoding))

    assert [row["dialogue"] for row in read(path)] == [rows[0]["dialogue"]]


def test_another_encoding_is_named_with_a_way_to_convert_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(f'dialogue,summary\n"café {LONG}",s\n'.encode("cp1252"))

    assert "iconv -f cp1252 -t utf-8" in error_of(DataConfig(path=str(path)))


BY_ROW = {str(i): row for i, row in enumerate(make_rows(LONG, LONG + "!"))}
DOCUMENTS = {
    "list": list(BY_ROW.values()),
    "under a name": {"version": 1, "data": list(BY_ROW.values())},
    "by split": {"test": make_rows("no"), "train": list(BY_ROW.values())},
    "by identity": BY_ROW,
    "columns": {name: [row[name] for row in BY_ROW.values()] for name in BY_ROW["0"]},
    "columns of pandas": {
        name: {key: row[name] for key, row in BY_ROW.items()} for name in BY_ROW["0"]
    },
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("shape", DOCUMENTS)
def test_a_whole_file_of_json_gives_its_rows(tmp_path, shape, indent, name):
    path = tmp_path / name
    path.write_text(json.dumps(DOCUMENTS[shape], indent=indent))

    assert read(path) == list(BY_ROW.values())


def test_indented_objects_that_follow_one_another_are_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row, indent=1) for row in BY_ROW.values()))

    assert read(path) == list(BY_ROW.values())


def test_lists_of_several_names_need_a_split(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"a": make_rows(LONG), "b": make_rows(LONG)}))

    assert "has the lists a, b" in error_of(DataConfig(path=str(path)))


@pytest.mark.parametrize(
    ("name", "start", "separator"),
    [
        ("rows.tsv", "", "\t"),
        ("rows.csv", "", ";"),
        ("rows.csv", "", "\t"),
        ("rows.csv", "sep=|\n", "|"),
    ],
)
def test_the_separator_of_fields_follows_from_the_first_line(tmp_path, name, start, separator):
    path = tmp_path / name
    dialogue = LONG.replace("\n", " ")
    path.write_text(start + separator.join(["dialogue", "summary"]) + f"\n{dialogue}{separator}s\n")

    assert read(path) == [{"dialogue": dialogue, "summary": "s"}]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_rows_after_a_quote_that_is_never_closed_are_reported_with_its_line(tmp_path, end):
    path = tmp_path / "rows.csv"
    newline = end or "\n"
    dialogue = "word " * 60
    lines = ["id,dialogue,summary", *(f"{i},{dialogue},short" for i in range(10))]
    lines[4] = '3,"Hello, said she,short'
    path.write_text(newline.join(lines) + end, newline="")
    config = DataConfig(path=str(path))

    *whole, last = peek(locate(config), config)

    assert [row["id"] for row in whole] == ["0", "1", "2"]
    assert reason_to_leave_out(last, config) == (
        "from the quote in line 5 that is never closed, with all 7 lines to the end"
    )


def test_rows_joined_by_a_late_quote_are_reported_with_their_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n3,"x,y\n4,5\n6,7",8,9\n')
    config = DataConfig(path=str(path))

    row = list(peek(locate(config), config))[1]

    assert reason_to_leave_out(row, config) == (
        "in lines 3 to 5, joined by a quote that ends too late"
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text(f'dialogue,summary,dialogue\n"{LONG}",s,x\n')
    else:
        columns = [pa.array([LONG]), pa.array(["s"]), pa.array(["x"])]
        table = pa.Table.from_arrays(columns, names=["dialogue", "summary", "dialogue"])
        parquet.write_table(table, path)

    assert "more than one column 'dialogue'" in error_of(DataConfig(path=str(path)))


@pytest.mark.parametrize("file_kind", ["stream", "file"])
def test_arrow_files_and_texts_in_binary_columns_are_read(tmp_path, file_kind):
    table = pa.table({"dialogue": [LONG.encode()], "summary": ["s"]})
    path = tmp_path / "rows.arrow"
    make = pa.ipc.new_stream if file_kind == "stream" else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table)

    assert read(path) == [{"dialogue": LONG, "summary": "s"}]


# ---- folders as other programs write them ------------------------------------------------------


def test_a_data_set_saved_to_disk_is_read_without_caches_beside_it(tmp_path):
    rows = make_rows(LONG, LONG + "!")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/cache-0.arrow").write_bytes(b"of another time")

    assert read(tmp_path / "saved") == rows

    (tmp_path / "saved/data-00000-of-00001.arrow").unlink()
    assert "which its state.json names" in error_of(DataConfig(path=str(tmp_path / "saved")))


def test_a_split_of_saved_data_sets_is_read(tmp_path):
    sets = {name: datasets.Dataset.from_list(make_rows(name + LONG)) for name in ("train", "test")}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")

    assert [row["dialogue"][:4] for row in read(tmp_path / "saved", split="test")] == ["test"]
    source = locate(DataConfig(path=str(tmp_path / "saved")))
    assert source.note == "data.split=train of data.path is read; not read: test"
    assert "has the splits train, test" in error_of(
        DataConfig(path=str(tmp_path / "saved"), split="dev")
    )


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "validation.csv", "test.csv"),
        ("x.train.csv", "x.dev.csv", "x.test.csv"),
        ("data/train-0-of-1.csv", "data/validation-0-of-1.csv", "data/test-0-of-1.csv"),
        ("train/0.csv", "val/0.csv", "test/0.csv"),
    ],
)
def test_splits_side_by_side_are_told_apart(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_csv(tmp_path / name, make_rows(f"{name} {LONG}"))

    for split, name in zip(("train", "validation", "test"), names, strict=True):
        assert [row["dialogue"].split()[0] for row in read(tmp_path, split=split)] == [name]
    assert "not read: test, validation" in locate(DataConfig(path=str(tmp_path))).note
    assert "has files of the splits" in error_of(DataConfig(path=str(tmp_path), split="other"))


def test_hidden_files_marks_empty_parts_and_metadata_in_a_folder_are_no_data(tmp_path):
    write_parquet(tmp_path / "part-0.parquet", make_rows(LONG))
    write_parquet(
        tmp_path / "part-1.parquet", [{"dialogue": LONG + "!", "summary": 3, "more": [1]}]
    )
    for name in (
        ".part-0.parquet.crc",
        ".hidden.jsonl",
        "_SUCCESS",
        "_temporary.csv",
        "part-2.parquet",
    ):
        (tmp_path / name).touch()
    (tmp_path / "dataset_infos.json").write_text("{}")

    first, second = read(tmp_path)

    assert first == make_rows(LONG)[0]
    assert second == {"dialogue": LONG + "!", "summary": 3, "more": [1]}


def test_a_damaged_file_is_found_wherever_it_is_in_a_folder(tmp_path):
    write_parquet(tmp_path / "a.parquet", make_rows(LONG))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 is all there is")

    assert "b.parquet cannot be read as parquet" in error_of(DataConfig(path=str(tmp_path)))


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "nothing.jsonl")

    assert "is a link to a file that does not exist" in error_of(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found a.py"),
            "refs/convert/parquet",
        ),
        (datasets.exceptions.DatasetGenerationError("failed"), "refs/convert/parquet"),
        (ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), "['a', 'b']"),
        (ValueError('Unknown split "x". Should be one of [...]'), "data.split='train'"),
        (ConnectionError("no network"), "cannot be loaded from here"),
    ],
)
def test_a_hub_data_set_that_cannot_be_loaded_is_refused_with_a_remedy(
    error, expected, monkeypatch
):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)

    with pytest.raises(ConfigError) as caught:
        load_hub(DataConfig(path="a/b"))
    assert expected in str(caught.value)


def test_ingest_reads_rows_of_any_types_from_any_file_of_a_folder(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"dialogue": LONG, "day": datetime.date(2024, 2, 29)}])
    write_parquet(tmp_path / "b.parquet", [{"dialogue": LONG, "day": 3.5, "more": {"x": [None]}}])
    config = DataConfig(path=str(tmp_path), summary_column=None)
    source = locate(config)

    tables = read_as_json(pa.table({"path": list(source.paths)}), source.kind, config)

    assert [json.loads(row) for table in tables for row in table["row"].to_pylist()] == [
        {"dialogue": LONG, "day": "2024-02-29"},
        {"dialogue": LONG, "day": 3.5, "more": {"x": [None]}},
    ]


def test_compressed_text_without_a_suffix_and_answers_of_the_hubs_server_are_read(tmp_path):
    rows = make_rows(LONG, LONG + "!")
    path = tmp_path / "rows.json"
    answer = {"rows": [{"row_idx": i, "row": row} for i, row in enumerate(rows)]}
    path.write_bytes(gzip.compress(json.dumps(answer).encode()))

    assert read(path) == rows


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")

    assert "git lfs pull" in error_of(DataConfig(path=str(path)))
