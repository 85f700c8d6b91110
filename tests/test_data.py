"""The sources that `data.path` may name, and the message for each unusable one."""

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.files import Source, check_rows, locate, parse_json_row, peek

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
