"""From rows to prompts, and all random numbers, which are functions of seed and position."""

import datetime
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ray_detox import draws
from ray_detox.config import DataConfig, SamplingConfig
from ray_detox.data import prompts
from ray_detox.records import LeftOutRow, PreparedRow

CONFIG = DataConfig(min_chars=5, max_chars=10)
IDS = [prompts.prompt_id(text) for text in ("one", "two", "three", "four")]


# ---- which rows become prompts -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no dialogue"),
        ({"dialogue": None}, "no dialogue"),
        ({"dialogue": 17}, "dialogue is not text"),
        ({"dialogue": ""}, "empty dialogue"),
        ({"dialogue": " \n\t    "}, "empty dialogue"),
        ({"dialogue": "abc\ud800defg"}, "dialogue is not valid Unicode"),
        ({"dialogue": "12345"}, "not over 5 characters"),
        ({"dialogue": "123456"}, None),
        ({"dialogue": "1234567890"}, None),
        ({"dialogue": "12345678901"}, "over 10 characters"),
    ],
)
def test_a_row_is_left_out_for_the_first_reason_that_holds(row, reason):
    assert prompts.reason_to_leave_out(row, CONFIG) == reason


def test_the_length_filter_counts_characters_and_not_bytes():
    assert prompts.reason_to_leave_out({"dialogue": "ü" * 10}, CONFIG) is None


def test_the_reason_names_the_configured_column():
    config = DataConfig(dialogue_column="talk")

    assert prompts.reason_to_leave_out({"dialogue": "x" * 300}, config) == "no talk"


def test_a_prompt_is_the_template_around_the_dialogue():
    text = prompts.prompt_text("A: hello\nB: hi", DataConfig())

    assert text == "\nSummarize the following conversation.\n\nA: hello\nB: hi\n\nSummary:\n"


@given(st.text())
def test_braces_in_a_dialogue_are_kept(dialogue):
    assume("{dialogue}" not in dialogue)

    text = prompts.prompt_text(dialogue, DataConfig(template="<{dialogue}> {and} {0}"))

    assert text == f"<{dialogue}> {{and}} {{0}}"


# ---- preparing rows ----------------------------------------------------------------------------


def tokenise_words(texts, **_):
    """A tokenizer: one token per word, and one for the end."""
    return {"input_ids": [[*range(2, 2 + len(text.split())), 1] for text in texts]}


DATA = DataConfig(min_chars=5, max_chars=20, template="Sum up: {dialogue}", max_prompt_tokens=5)


def test_a_prepared_row_has_its_prompt_its_tokens_and_its_columns():
    row = {"id": "a1", "dialogue": "A: hello", "summary": "s"}

    (prepared,) = prompts.prepare([row], DATA, tokenise_words)

    assert prepared == PreparedRow(
        prompt_id=prompts.prompt_id("Sum up: A: hello"),
        prompt="Sum up: A: hello",
        query_ids=[2, 3, 4, 5, 1],
        columns=row,
        copy=0,
        more_references=(),
    )


def test_every_row_keeps_its_position_even_if_it_is_left_out():
    rows = [
        {"dialogue": "one two three"},  # six tokens, with the template and the end
        {"dialogue": None},
        {"dialogue": "A: fine"},
        {"dialogue": "x" * 21},
    ]

    prepared = prompts.prepare(rows, DATA, tokenise_words)

    assert [getattr(row, "reason", None) for row in prepared] == [
        "over 5 prompt tokens",
        "no dialogue",
        None,
        "over 20 characters",
    ]
    assert isinstance(prepared[2], PreparedRow)
    assert prepared[2].prompt == "Sum up: A: fine"


def test_rows_that_are_all_left_out_are_never_tokenised():
    prepared = prompts.prepare([{"dialogue": ""}], DATA, tokenizer=None)

    assert [row.reason for row in prepared] == ["empty dialogue"]
    assert prompts.prepare([], DATA, tokenizer=None) == []


def test_a_row_that_is_left_out_is_named_by_its_id():
    (row,) = prompts.prepare([{"id": "a1", "dialogue": "y" * 200}], DATA, tokenise_words)

    assert row == LeftOutRow(name="'a1'", reason="over 20 characters")


def test_a_row_without_an_id_is_named_by_the_start_of_its_dialogue():
    (row,) = prompts.prepare([{"dialogue": "y" * 200}], DATA, tokenise_words)

    assert row.name == "'" + "y" * 56 + "..."


def test_the_columns_of_a_row_keep_json_values_and_turn_others_into_text():
    row = {"dialogue": "A: ü {x}", "summary": None, "facts": ["one", 2]}
    dated = row | {"day": datetime.date(2024, 2, 29)}

    (prepared,) = prompts.prepare([dated], DATA.replace(max_prompt_tokens=6), tokenise_words)

    assert prepared.columns == row | {"day": "2024-02-29"}
    assert prepared.prompt == "Sum up: A: ü {x}"
    assert prepared.query_ids == [2, 3, 4, 5, 6, 1]


# ---- identity ----------------------------------------------------------------------------------


@given(st.lists(st.text(), unique=True, max_size=20))
def test_ids_are_sixteen_hexadecimal_digits_and_differ_for_different_texts(texts):
    ids = [prompts.prompt_id(text) for text in texts]

    assert len(set(ids)) == len(ids)
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in ids)


def test_ids_are_the_same_in_every_version():
    assert prompts.prompt_id("Summarize: ü") == "f7bdcfe62a7b25af"


# ---- the split ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"),
    [
        (10_022, 0.2, 2_005),  # the published split: 8,017 / 2,005
        (10, 0.2, 2),
        (11, 0.2, 3),
        (2, 0.01, 1),
        (100, 0.07, 7),  # 0.07 * 100 in binary is just above 7
    ],
)
def test_the_number_of_held_out_rows_is_rounded_up(rows, fraction, held_out):
    assert prompts.held_out_count(rows, fraction) == held_out


# ---- random numbers ----------------------------------------------------------------------------

SAMPLING = SamplingConfig(max_new_tokens="3..9")


def test_limits_and_noise_are_in_their_ranges():
    many = [prompts.prompt_id(str(n)) for n in range(500)]

    limits, noise = draws.sampling_noise(many, SAMPLING, seed=0, step=0)

    assert set(limits.tolist()) == set(range(3, 10)), "both ends included"
    assert noise.shape == (500, 9)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02)


@given(st.permutations(range(4)), st.integers(1, 4))
def test_the_noise_of_a_prompt_does_not_depend_on_the_other_prompts(order, count):
    limits, noise = draws.sampling_noise(IDS, SAMPLING, seed=5, step=2)
    chosen = order[:count]

    some_limits, some_noise = draws.sampling_noise(
        [IDS[i] for i in chosen], SAMPLING, seed=5, step=2
    )

    np.testing.assert_array_equal(some_limits, limits[chosen])
    np.testing.assert_array_equal(some_noise, noise[chosen])


def test_seed_step_and_prompt_each_change_the_noise():
    found = [
        draws.sampling_noise([name], SAMPLING, seed, step)[1].tobytes()
        for name in IDS
        for seed in (0, 1)
        for step in (draws.EVALUATION, 0, 1)
    ]

    assert len(set(found)) == len(found)


def test_the_copies_of_a_prompt_get_different_noise_and_the_first_that_of_a_single_one():
    ids = [IDS[0], IDS[1], IDS[0], IDS[0]]

    _, noise = draws.sampling_noise(ids, SAMPLING, seed=0, step=3, occurrences=[0, 0, 1, 2])

    assert len({row.tobytes() for row in noise}) == 4
    _, alone = draws.sampling_noise(IDS[:2], SAMPLING, seed=0, step=3)
    np.testing.assert_array_equal(noise[:2], alone)


def test_copies_are_numbered_across_parts():
    seen = Counter()

    parts = [prompts.number_copies(part, seen) for part in (["a", "b", "b"], ["b", "a", "c"])]

    assert parts == [[0, 0, 1], [2, 1, 0]]


def test_rows_of_one_prompt_are_merged_and_no_more_rows_are_read_than_needed():
    def rows():
        for name, summary in [
            ("a", "x"),
            ("a", "y"),
            ("a", "x"),
            ("b", None),
            ("b", "z"),
            ("c", "w"),
        ]:
            columns = {"summary": summary, "id": 1}
            yield PreparedRow(name, name.upper(), [1], columns, 2, ())
        raise AssertionError("read too far")

    merged = prompts.merge_repeated(rows(), DataConfig(), at_most=2)

    assert [(row.prompt_id, row.columns["summary"], row.more_references) for row in merged] == [
        ("a", "x", ("y",)),
        ("b", None, ("z",)),
    ]
    assert [row.copy for row in merged] == [0, 0]


def test_the_noise_does_not_depend_on_the_global_generator():
    np.random.seed(0)
    first = draws.sampling_noise(IDS, SAMPLING, 0, 0)
    np.random.seed(1)
    second = draws.sampling_noise(IDS, SAMPLING, 0, 0)

    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


# ---- minibatches -------------------------------------------------------------------------------


@given(
    st.integers(0, 99), st.integers(0, 99), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)
)
def test_every_block_of_rows_gives_one_row_to_each_minibatch(
    seed, step, epoch, blocks, minibatches
):
    rows = blocks * minibatches

    assignment = draws.minibatch_assignment(seed, step, epoch, rows, minibatches)

    assert assignment.shape == (rows,)
    for block in assignment.reshape(blocks, minibatches):
        assert sorted(block.tolist()) == list(range(minibatches))


def test_seed_step_and_epoch_each_change_the_assignment():
    assignments = [
        draws.minibatch_assignment(seed, step, epoch, 64, 4).tobytes()
        for seed in (0, 1)
        for step in (0, 1)
        for epoch in (0, 1)
    ]

    assert len(set(assignments)) == len(assignments)


# ---- shards ------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, 15), st.integers(1, 13), st.integers(1, 7))
def test_every_row_of_a_shard_occurs_exactly_once_per_epoch(seed, shard, rows, per_step):
    steps = -(-3 * rows // per_step)  # three epochs and a little more

    stream = [
        pair
        for step in range(steps)
        for pair in draws.shard_rows(seed, step, shard, rows, per_step)
    ]

    assert [epoch for epoch, _ in stream] == [position // rows for position in range(len(stream))]
    for epoch in range(3):
        assert sorted(row for e, row in stream if e == epoch) == list(range(rows))


@given(st.integers(0, 40), st.integers(1, 13), st.integers(1, 7))
def test_the_rows_of_a_step_do_not_depend_on_earlier_calls(step, rows, per_step):
    before = [draws.shard_rows(3, earlier, 2, rows, per_step) for earlier in range(step + 1)]

    assert draws.shard_rows(3, step, 2, rows, per_step) == before[-1]
    assert len(before[-1]) == per_step


def test_seed_epoch_and_shard_each_change_the_order():
    order = lambda seed, step, shard: [
        row for _, row in draws.shard_rows(seed, step, shard, 30, 30)
    ]

    orders = [
        tuple(order(seed, step, shard)) for seed in (0, 1) for step in (0, 1) for shard in (0, 1)
    ]

    assert len(set(orders)) == len(orders)
