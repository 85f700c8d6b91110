"""What `data.path` may name, and the sentence for each way in which it cannot be used."""

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.files import Source, check_rows, locate, parse_json_row, peek

LONG = "#Person1#: Did you see the match?\n#Person2#: I did, and what a match it was!\n" * 4
QUOTED = f'He said: "no, never", and left;\r\n{LONG}'


def rows_of(*dialogues, **more):
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


def look(config):
    check_rows(locate(config), config)


def refusal(config):
    """The one line with which the data are refused."""
    with pytest.raises(ConfigError) as caught:
        look(config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# Each of the three kinds of file.


def test_a_file_is_located_by_its_ending(write, kind, tmp_path):
    config = write(rows_of(LONG))

    assert locate(config) == Source(kind, (str(tmp_path / f"rows.{kind}"),))


def test_rows_come_back_as_they_were_written(write):
    rows = rows_of(LONG, QUOTED, "short")

    config = write(rows)

    assert list(peek(locate(config), config)) == rows


def test_one_usable_row_is_enough(write):
    look(write(rows_of("short", "", LONG)))


def test_a_missing_dialogue_column_is_named_with_those_there_are(write):
    sentence = refusal(write(rows_of(LONG), dialogue_column="conversation"))

    assert "has no column 'conversation'; its columns are id, dialogue, summary" in sentence
    assert "Set data.dialogue_column" in sentence


def test_a_missing_summary_column_is_named_with_the_way_to_do_without(write):
    sentence = refusal(write(rows_of(LONG), summary_column="highlights"))

    assert "has no column 'highlights'; its columns are id, dialogue, summary" in sentence
    assert "or to null" in sentence


def test_summaries_are_not_needed_where_none_are_asked_for(write):
    look(write([{"dialogue": LONG}], summary_column=None))


def test_a_filter_that_leaves_nothing_says_how_many_rows_went_and_why(write):
    sentence = refusal(write(rows_of("short", "shorter", " ", LONG * 5)))

    assert "None of the 4 rows" in sentence
    assert "2 not over 200 characters" in sentence
    assert "1 empty dialogue" in sentence
    assert "1 over 1000 characters" in sentence
    assert "Widen data.min_chars and data.max_chars" in sentence


def test_rows_beyond_the_limit_are_not_looked_at(write):
    sentence = refusal(write(rows_of("short", "short", LONG), limit=2))

    assert "None of the 2 rows" in sentence


# What only one kind of file can get wrong.


def test_lines_that_are_no_json_object_are_rows_without_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"dialogue": LONG, "summary": "s"})
    path.write_text(f'{{"dialogue": \n[1, 2]\n"text"\n\n{good}\n', encoding="utf-8")
    config = DataConfig(path=str(path))

    rows = list(peek(locate(config), config))

    assert rows == [{}, {}, {}, {"dialogue": LONG, "summary": "s"}]
    look(config)


@pytest.mark.parametrize("line", ["{", "null", "3", '["a"]', "NaN", ""])
def test_a_line_that_is_no_json_object_is_an_empty_row(line):
    assert parse_json_row(line) == {}


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("jsonl", "not json\nat all\n", "a JSON object in each line"),
        ("csv", "id,dialogue\n1,a,b\n2,c,d\n", "as many fields in each row as in the first line"),
    ],
)
def test_a_file_without_a_single_good_row_is_refused_with_what_is_expected(
    tmp_path, kind, content, expected
):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)

    sentence = refusal(DataConfig(path=str(path)))

    assert f"None of the 2 rows of data.path={path} can be read as {kind}" in sentence
    assert expected in sentence


def test_numbers_instead_of_dialogues_are_counted_as_such(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows_of(12, 3.5, ["a", "b"], {"text": LONG}))

    assert "4 dialogue is not text" in refusal(DataConfig(path=str(path)))


def test_text_that_no_utf8_can_hold_is_counted_as_such(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"dialogue": "\ud800" + LONG}) + "\n")

    assert "1 dialogue is not valid Unicode" in refusal(DataConfig(path=str(path)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_dialogue_in_another_encoding_is_counted_as_such(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, rows_of("cafe " + LONG))
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))

    assert "1 dialogue is not valid Unicode" in refusal(DataConfig(path=str(path)))


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("dialogue\n")

    assert "cannot be read as parquet" in refusal(DataConfig(path=str(path)))


def test_a_csv_dialogue_of_digits_is_text(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, rows_of("12", LONG))
    config = DataConfig(path=str(path))

    assert next(iter(peek(locate(config), config)))["dialogue"] == "12"


@pytest.mark.parametrize("row", ["a,b", "a,b,c,d"])
def test_a_csv_row_with_another_number_of_fields_is_a_row_without_columns(tmp_path, row):
    path = tmp_path / "rows.csv"
    path.write_text(f'id,dialogue,summary\n1,"two\nlines",short\n{row}\n')
    config = DataConfig(path=str(path))

    rows = list(peek(locate(config), config))

    assert rows == [{"id": "1", "dialogue": "two\nlines", "summary": "short"}, {}]


def test_a_csv_field_may_be_longer_than_the_reader_s_own_limit(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, rows_of(LONG, transcript="x" * 200_000))

    look(DataConfig(path=str(path)))


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    odd = LONG + "\u2028 \x85 \u2029"
    path.write_text(json.dumps({"dialogue": odd, "summary": ""}, ensure_ascii=False) + "\r\n")
    config = DataConfig(path=str(path))

    assert [row["dialogue"] for row in peek(locate(config), config)] == [odd]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"dialogue": LONG, "summary": "s"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    look(DataConfig(path=str(path)))


@pytest.mark.parametrize(("kind", "content"), [("jsonl", ""), ("csv", ""), ("csv", "dialogue\n")])
def test_a_file_without_rows_is_refused(tmp_path, kind, content):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)

    assert "holds no rows" in refusal(DataConfig(path=str(path)))


# Folders and names.


def test_a_folder_stands_for_its_files_by_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write_jsonl(tmp_path / name, rows_of(f"{name} {LONG}"))
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


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows_of(LONG))
    write_csv(tmp_path / "b.csv", rows_of(LONG))

    sentence = refusal(DataConfig(path=str(tmp_path)))

    assert "holds csv and jsonl files" in sentence
    assert "keep one kind" in sentence


def test_an_empty_folder_is_refused(tmp_path):
    assert "expected .jsonl, .csv or .parquet files there" in refusal(
        DataConfig(path=str(tmp_path))
    )


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_text("")

    assert "expected .jsonl, .csv or .parquet" in refusal(DataConfig(path=str(path)))


@pytest.mark.parametrize("name", ["/nowhere/rows.parquet", "./rows.jsonl", "rows.csv", "~/x/y/z"])
def test_a_path_where_nothing_is_is_refused_and_not_looked_up_on_a_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    sentence = refusal(DataConfig(path=name))

    assert repr(name) in sentence
    assert "no such file is here" in sentence


@pytest.mark.parametrize("name", ["knkarthick/dialogsum", "dialogsum"])
def test_other_names_are_hub_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert locate(DataConfig(path=name)) == Source("hub")


def test_the_embedded_corpus_is_not_a_file():
    assert locate(DataConfig(path="lab")) == Source("lab")
