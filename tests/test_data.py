"""The sources that `data.path` may name, and the message for each unusable one."""

import bz2
import csv
import datetime
import gzip
import json
import lzma
import os

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.files import Source, check_rows, load_hub, locate, peek
from ray_detox.data.json_rows import parse_json_row
from ray_detox.data.prompts import name_of, reason_to_leave_out, unreadable_row
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


def test_lines_that_are_not_json_objects_are_left_out_with_their_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"dialogue": LONG, "summary": "s"})
    path.write_text(f'{{"dialogue": \n[1, 2]\n"text"\n\n{good}\n', encoding="utf-8")
    config = DataConfig(path=str(path))

    rows = list(peek(locate(config), config))

    *bad, good_row = rows
    assert good_row == {"dialogue": LONG, "summary": "s"}
    assert {reason_to_leave_out(row, config) for row in bad} == {"not a JSON object"}
    assert [name_of(row, config).partition(":")[0] for row in bad] == ["line 1", "line 2", "line 3"]
    check(config)


@pytest.mark.parametrize("line", ["{", "null", "3", '["a"]', "NaN", ""])
def test_a_line_that_is_not_a_json_object_is_an_unreadable_row(line):
    assert parse_json_row(line, 7) == unreadable_row("not a JSON object", f"line 7: {line!r}")


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

    assert f"None of the 2 rows of data.path={path} can be read as {kind} (2 " in message
    assert "first line" in message
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


@pytest.mark.parametrize(("row", "which"), [("a,b", "fewer"), ("a,b,c,d", "more")])
def test_a_csv_row_with_another_number_of_fields_is_left_out_with_its_line(tmp_path, row, which):
    path = tmp_path / "rows.csv"
    path.write_text(f'id,dialogue,summary\n1,"two\nlines",short\n{row}\n')
    config = DataConfig(path=str(path))

    rows = list(peek(locate(config), config))

    assert rows == [
        {"id": "1", "dialogue": "two\nlines", "summary": "short"},
        unreadable_row(f"{which} fields than the first line", "line 4"),
    ]


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
        "more fields than the first line, over several lines (is a quote missing or not doubled?)"
    )
    assert name_of(row, config) == "lines 3 to 5"


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


# ---- contents that the name of a file does not say ---------------------------------------------


def parquet_bytes():
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(make_rows(LONG)), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "git lfs pull",
        ),
        ("a.csv", b"\n<!DOCTYPE html>\n<html><body>Sign in, please</body></html>", "a web page"),
        ("a.csv", b'<table border="1">\n<tr><th>dialogue</th></tr>', "a web page"),
        ("a.jsonl", b"<html>404</html>", "a web page"),
        ("a.jsonl.gz", gzip.compress(b"<html>404</html>", mtime=0), "a web page"),
        ("a.parquet", b"<?xml version='1.0'?><Error/>" * 9, "a web page or XML"),
        ("a.csv", b"PK\3\4 xl/workbook.xml", "save the sheet as .csv"),
        ("a.csv", b'[{"id": 1, "a": "b, c"}]', "is JSON and not csv. Rename it"),
        (
            "a.jsonl.gz",
            gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar", mtime=0),
            "a tar archive",
        ),
        ("a.parquet", gzip.compress(b"PAR1", mtime=0), "Decompress it"),
        ("a.csv", parquet_bytes(), "end in .parquet"),
    ],
)
def test_content_of_another_kind_than_the_name_says_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)

    assert expected in error_of(DataConfig(path=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["rows.jsonl.bz2", "rows.jsonl", "rows.jsonl.zst"])
def test_the_content_and_not_the_suffix_says_how_a_text_is_compressed(tmp_path, name):
    rows = make_rows(LONG)
    write_jsonl(tmp_path / "plain", rows)
    (tmp_path / name).write_bytes(lzma.compress((tmp_path / "plain").read_bytes()))
    assert read(tmp_path / name) == rows

    (tmp_path / name).write_bytes((tmp_path / "plain").read_bytes())
    assert read(tmp_path / name) == rows


ROW = json.dumps(make_rows(LONG)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[{ROW},\n{ROW},\n]", "line 3, column 1: a comma before ]"),
        (f"[{ROW},\n{ROW[:-1]},}},\n{ROW}\n]", f"line 2, column {len(ROW) + 1}: a comma before }}"),
        (f"{ROW},\n{ROW},\n", "a comma between lines; write one list in [ ]"),
        (f"[\n{ROW}, // the first\n{ROW}]", f"line 2, column {len(ROW) + 3}: a comment"),
        (str(make_rows(LONG)[0]), "line 1, column 2: a text in single quotes"),
        (f"[\n{ROW},\n{ROW[:-9]}", "a part of it is missing"),
        (f"\n\n[{ROW} {ROW}]", f"line 3, column {len(ROW) + 3}: Expecting ',' delimiter at"),
        ("[" * 5000, "nested too deeply"),
        ('{"a":' * 5000, "nested too deeply"),
    ],
)
def test_a_fault_of_a_whole_file_of_json_is_told_with_its_place(tmp_path, text, expected):
    path = tmp_path / "rows.json"
    path.write_text(text)

    assert expected in error_of(DataConfig(path=str(path)))


def test_a_row_that_is_nested_too_deeply_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"dialogue": "x", "more": {"[" * 5000}{"]" * 5000}}}\n{ROW}\n')

    first, second = read(path)

    assert reason_to_leave_out(first, DataConfig()) == "not a JSON object"
    assert second == make_rows(LONG)[0]


@pytest.mark.parametrize("make", ["{}\n{}\n", "[{}, {}]", "[\n{},\n{}\n]"])
def test_a_number_of_thousands_of_digits_is_kept_as_text(tmp_path, make):
    row = f'{ROW[:-1]}, "n": {"9" * 5000}}}'
    path = tmp_path / "rows.json"
    path.write_text(make.replace("{}", row))

    first, second = read(path)

    assert first == second == make_rows(LONG)[0] | {"n": "9" * 5000}
    json.dumps(first)


def test_names_and_lists_of_values_as_pandas_splits_them_are_rows(tmp_path):
    rows = make_rows(LONG, LONG + "!")
    path = tmp_path / "rows.json"
    data = [list(row.values()) for row in rows]
    path.write_text(json.dumps({"columns": list(rows[0]), "index": [0, 1], "data": data}))

    assert read(path) == rows


def test_a_column_inside_another_is_pointed_out(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": 1, "data": make_rows(LONG)[0]}]))

    assert "move the names inside 'data'" in error_of(DataConfig(path=str(path)))


def test_lists_of_messages_are_refused_with_what_is_expected(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"dialogue": [{"role": "user", "content": LONG}]}])

    assert "Write the dialogue of a row as one text" in error_of(DataConfig(path=str(path)))


# ---- quotes in CSV -----------------------------------------------------------------------------

TRICKY = (
    'He said "no", he did; "really"?\n' + LONG,
    "C:\\new\\table\\ and \\" + LONG,
    LONG + ' ends with "quotes"',
    '"starts" and a backslash before a quote \\"x\\" ' + LONG,
    'a plain one, with "\n" and \\n ' + LONG,
)


@pytest.mark.parametrize("first", range(len(TRICKY)))
@pytest.mark.parametrize("doubled", [True, False])
def test_quotes_may_be_doubled_or_follow_a_backslash(tmp_path, doubled, first):
    rows = make_rows(LONG, *TRICKY[first:], *TRICKY[:first])
    # Before the first quote that a backslash escapes, a file does not show which way it is written.
    if not doubled:
        rows = make_rows(TRICKY[0], *(row["dialogue"] for row in rows))
    path = tmp_path / "rows.csv"
    settings = {} if doubled else {"doublequote": False, "escapechar": "\\"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL, **settings)
        writer.writeheader()
        writer.writerows(rows)

    assert read(path) == rows


@pytest.mark.parametrize("end", ["", ' "'])
def test_rows_between_two_quotes_that_are_never_closed_are_reported(tmp_path, end):
    path = tmp_path / "rows.csv"
    lines = ["id,dialogue,summary", *(f"{i},{'word ' * 60},short" for i in range(10))]
    for i in (4, 7):
        lines[i] = f'{i - 1},"Hello said she{end},short'
    path.write_text("\n".join(lines) + "\n")

    rows = read(path)

    config = DataConfig()
    left_out = {
        name_of(row, config): reason_to_leave_out(row, config) for row in rows if "id" not in row
    }
    if end:
        assert not left_out
        assert len(rows) == 10
    else:
        assert left_out == {
            "lines 5 to 8": "text after a closing quote, over several lines (is a quote missing or not "
            "doubled?)"
        }
        assert len(rows) == 7


def test_a_backslash_before_the_end_of_a_field_is_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'a,dialogue,summary\n"C:\\dir\\","{LONG}","5\\"\n1,"{LONG}",5\\" long\n')

    assert [(row["a"], row["summary"]) for row in read(path)] == [
        ("C:\\dir\\", "5\\"),
        ("1", '5\\" long'),
    ]


def test_rows_with_a_name_that_the_first_line_lacks_are_refused_in_one_reason(tmp_path):
    path = tmp_path / "rows.csv"  # as write.table of R leaves it
    rows = "".join(f'"{i}","{LONG}","s"\n' for i in range(20))
    path.write_text(f'"dialogue","summary"\n{rows}')

    message = error_of(DataConfig(path=str(path)))

    assert "(20 more fields than the first line, over several lines" in message
    assert "first lines 2 to 10)" in message


def test_columns_without_names_are_listed_in_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'1,"{LONG}",s\n2,"{LONG}",s\n')

    assert "the first line has to name them" in error_of(DataConfig(path=str(path)))


# ---- odd things in folders ---------------------------------------------------------------------


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")

    for path in (tmp_path, tmp_path / "rows.jsonl", "/dev/null"):
        assert "is a pipe or a device and not a file" in error_of(DataConfig(path=str(path)))


def test_a_folder_that_links_lead_to_again_is_read_once(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/rows.jsonl", make_rows(LONG))
    (tmp_path / "data/again").symlink_to(tmp_path)
    (tmp_path / "more").symlink_to(tmp_path / "data")

    assert len(read(tmp_path)) == 1


def test_files_in_folders_beside_files_are_not_read_and_said(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", make_rows(LONG))
    (tmp_path / "old").mkdir()
    write_jsonl(tmp_path / "old/rows.jsonl", make_rows(LONG))

    assert len(read(tmp_path)) == 1
    note = locate(DataConfig(path=str(tmp_path))).note
    assert note == "files in folders of data.path are not read: old"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_the_column_that_others_of_its_folder_have_is_refused(tmp_path, kind):
    WRITERS[kind](tmp_path / f"a.{kind}", make_rows(LONG))
    WRITERS[kind](tmp_path / f"b.{kind}", [{"text": LONG, "summary": "s"}])

    message = error_of(DataConfig(path=str(tmp_path)))

    assert f"b.{kind} has no column 'dialogue'" in message
    assert "its columns are text, summary" in message


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    write_jsonl(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), make_rows(LONG))

    assert "is not UTF-8. Rename the file" in error_of(DataConfig(path=str(tmp_path)))


def test_columns_in_the_names_of_folders_belong_to_the_rows(tmp_path):
    for folder in ("topic=food", "topic=a%20b", "topic=__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "part-0.parquet", make_rows(LONG))

    assert [row["topic"] for row in read(tmp_path)] == [None, "a b", "food"]


# ---- configurations of hub datasets ------------------------------------------------------------


def test_a_configuration_of_a_hub_data_set_is_chosen_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # A folder with a dataset card is loaded like a repository of the hub.
    files = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("a", "b"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", make_rows(name))

    def load(**settings):
        return load_hub(DataConfig(path=str(tmp_path), **settings))

    assert load(configuration="b")["dialogue"] == ["b"]
    with pytest.raises(ConfigError, match=r"several conf.*data\.configuration=a; there are a, b\."):
        load()
    with pytest.raises(ConfigError, match=r"no configuration 'c'.*=a; there are a, b\."):
        load(configuration="c")


def test_a_configuration_of_files_is_refused(write):
    message = error_of(write(make_rows(LONG), configuration="a"))

    assert "is no hub dataset, so it has no configurations" in message
