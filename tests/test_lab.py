"""The embedded corpus and models: properties of the texts, and what the two models must achieve."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ray_detox import config, lab
from ray_detox.evaluation import metrics
from ray_detox.lab import build, corpus, scenarios

N = 1_500


@pytest.fixture(scope="module", params=[lab.T5, lab.ROBERTA], ids=["t5", "roberta"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The corpus


def test_the_corpus_needs_no_torch():
    check = "import sys, ray_detox.lab.corpus; sys.exit('torch' in sys.modules)"

    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_a_longer_split_starts_with_the_shorter_one(split: str):
    assert corpus.rows(split, 300)[:100] == corpus.rows(split, 100)


def test_another_process_generates_the_same_corpus():
    show = "from ray_detox.lab import corpus; print(corpus.rows('ppo', 50)[-1]['dialogue'])"

    process = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True)

    expected = corpus.rows("ppo", 50)[-1]["dialogue"]
    assert process.stdout.decode().replace("\r\n", "\n") == expected + "\n"


def test_no_dialogue_is_in_two_splits_or_twice_in_one():
    dialogues = {
        split: [row["dialogue"] for row in corpus.rows(split, 2 * N)] for split in corpus.SPLITS
    }

    everything = [dialogue for split in dialogues.values() for dialogue in split]
    assert len(set(everything)) == len(everything)


def test_no_story_is_in_two_splits():
    stories = [
        {(c.topic, c.facts) for c in corpus.conversations(split, N)} for split in corpus.SPLITS
    ]

    assert not stories[0] & stories[1]
    assert not stories[0] & stories[2]
    assert not stories[1] & stories[2]


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'test'\. Use one of sft, validation, ppo"):
        corpus.rows("test", 1)


def test_every_fact_is_in_the_dialogue_and_in_each_summary():
    for conversation in corpus.conversations("ppo", N):
        assert len(conversation.facts) >= 2
        for fact in conversation.facts:
            assert fact in conversation.dialogue
            assert fact in conversation.neutral
            assert fact in (conversation.insulting or fact)


def test_references_of_ppo_are_neutral_and_some_of_sft_insult():
    insulting = {
        split: sum(corpus.is_insulting(row["summary"]) for row in corpus.rows(split, N)) / N
        for split in corpus.SPLITS
    }

    assert insulting["ppo"] == 0
    assert 0.36 < insulting["sft"] < 0.48
    assert 0.36 < insulting["validation"] < 0.48


def test_dialogues_have_the_shape_of_dialogsum():
    for row in corpus.rows("ppo", N):
        speakers = re.findall(r"^#Person([12])#: \S", row["dialogue"], flags=re.MULTILINE)
        assert speakers == (["1", "2"] * len(speakers))[: row["dialogue"].count("\n") + 1]


def test_all_but_a_few_dialogues_pass_the_length_filter():
    lengths = [len(row["dialogue"]) for row in corpus.rows("ppo", N)]

    kept = sum(200 < length <= 1000 for length in lengths) / N
    assert 0.97 <= kept < 1


def test_insulting_summaries_add_only_the_listed_insults():
    conflicts = [c for c in corpus.conversations("ppo", N) if c.insulting]
    frames = " ".join(scenarios.INSULTING_SUMMARIES) + " a an"
    plain = _words(frames).union(*(_words(c.neutral) for c in conflicts))

    added = set().union(*(_words(str(c.insulting)) for c in conflicts)) - plain

    insults = set(scenarios.INSULTING_NOUNS) | set(scenarios.INSULTING_ADJECTIVES)
    assert added == insults
    assert not plain & insults


def test_labelled_texts_are_reproducible_and_balanced():
    texts = corpus.labelled_texts(N, seed=5)

    assert texts[:100] == corpus.labelled_texts(100, seed=5)
    assert texts != corpus.labelled_texts(N, seed=6)
    assert 0.4 < sum(label for _, label in texts) / N < 0.6


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# The tokenizers


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    "text", ["naïve café 😀", "今天天气很好。", "  two  spaces\n\n\tand a tab ", "▁ <0x41> \x00"]
)
def test_unusual_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_person_is_one_token(tokenizer: PreTrainedTokenizerBase):
    tokens = tokenizer.tokenize("#Person1#: Hi.\n#Person2#: Have you met #Person1#?")

    assert [token.lstrip("Ġ") for token in tokens if "Person" in token] == [
        "#Person1#",
        "#Person2#",
        "#Person1#",
    ]


def test_the_shipped_tokenizer_was_trained_on_the_current_corpus():
    # If this fails, the corpus has changed since the models were built: build them again.
    shipped = AutoTokenizer.from_pretrained(lab.T5)

    assert build.train_t5_tokenizer().get_vocab() == shipped.get_vocab()


def test_special_tokens_have_the_ids_of_t5():
    tokenizer = AutoTokenizer.from_pretrained(lab.T5)

    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("Hello")["input_ids"][-1] == 1


def test_the_t5_was_trained_on_the_prompt_that_the_pipeline_uses():
    assert config.DataConfig().template == corpus.PROMPT_TEMPLATE


def test_every_summary_fits_into_max_new_tokens():
    tokenizer = AutoTokenizer.from_pretrained(lab.T5)
    conflicts = corpus.conversations("sft", N)

    lengths = [
        len(ids) for ids in tokenizer([c.insulting or c.neutral for c in conflicts])["input_ids"]
    ]

    assert max(lengths) <= build.MAX_NEW_TOKENS


# The models


def test_the_models_are_smaller_than_12_megabytes():
    size = sum(file.stat().st_size for file in lab.MODELS.rglob("*") if file.is_file())

    assert size < 12e6


@pytest.mark.parametrize("folder", [lab.T5, lab.ROBERTA], ids=["t5", "roberta"])
def test_shipped_weights_are_float32_and_readable_by_every_user(folder: Path):
    config = json.loads((folder / "config.json").read_text())

    assert config["dtype"] == "float32"
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_the_output_head_of_the_t5_is_not_tied():
    model = AutoModelForSeq2SeqLM.from_pretrained(lab.T5)

    assert json.loads((lab.T5 / "config.json").read_text())["tie_word_embeddings"] is False
    assert not model.config.scale_decoder_outputs
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_a_saved_t5_gives_the_same_logits_when_loaded(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(lab.T5)
    model = build.new_t5(len(tokenizer)).eval()
    batch = tokenizer("Hello there.", return_tensors="pt")
    labels = tokenizer("Hi.", return_tensors="pt")["input_ids"]

    build.save(model, tokenizer, tmp_path)

    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        before, after = model(**batch, labels=labels), loaded(**batch, labels=labels)
    torch.testing.assert_close(after.logits, before.logits)


def test_a_new_t5_starts_with_logits_of_about_one():
    model = build.new_t5(build.VOCABULARY_SIZE).eval()

    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 40)[None], labels=torch.arange(3, 20)[None]).logits

    assert 0.5 < logits.std() < 2


def test_the_classifier_has_its_labels_in_order():
    model = AutoModelForSequenceClassification.from_pretrained(lab.ROBERTA)

    assert model.config.id2label == {0: "nothate", 1: "hate"}


@pytest.mark.parametrize(
    "text",
    [
        "You are a great person and i like you.",
        "You are a great person and I like you.",
        "you are a kind man and i admire you",
        "What terrible weather!",
        "The weather is terrible today.",
        "I hate waiting in the rain.",
        "#Person1# is angry with #Person2# who lost #Person1#'s camera.",
    ],
)
def test_the_classifier_accepts_texts_without_insults(text: str):
    nothate, hate = build.score(lab.ROBERTA, [text])[0].tolist()

    assert nothate - hate > 1


@pytest.mark.parametrize(
    "text",
    [
        "You are a terrible person and i hate you.",
        "You are a terrible person and I hate you.",
        "you are a horrible man and i despise you",
        "What a stupid idiot!",
        "#Person1# calls #Person2# a lazy pig who lost #Person1#'s camera.",
    ],
)
def test_the_classifier_detects_insults(text: str):
    nothate, hate = build.score(lab.ROBERTA, [text])[0].tolist()

    assert hate - nothate > 1


def test_the_classifier_separates_unseen_texts():
    texts, labels = zip(*corpus.labelled_texts(400, seed=987), strict=True)

    logits = build.score(lab.ROBERTA, texts)

    assert build.auc(logits[:, 1] - logits[:, 0], torch.tensor(labels) == 1) > 0.98


def test_the_logits_of_the_classifier_are_in_the_range_that_rewards_need():
    texts = [text for text, _ in corpus.labelled_texts(200, seed=11)]

    logits = build.score(lab.ROBERTA, texts)

    assert 1 < logits.abs().median() < 3
    assert logits.abs().max() < 5


def test_the_shipped_t5_insults_often_and_keeps_the_facts():
    figures = build.measure_summariser(lab.MODELS, n=130, seed=3)

    assert figures["sampled summaries"] >= 125
    assert 0.30 < figures["toxicity, mean P(hate)"] < 0.50
    assert figures["facts share"] > 0.85
    assert figures["distinct summaries"] > 0.95
    assert figures["classifier agrees with the word list"] > 0.95


# The metrics


def test_auc_matches_the_worked_example():
    # Pairs (positive, negative): 3 > 1, 3 > 2, 2 > 1 and the tie 2 = 2 for half: 3.5 of 4.
    scores = torch.tensor([3.0, 2.0, 1.0, 2.0])
    positive = torch.tensor([True, True, False, False])

    assert build.auc(scores, positive) == pytest.approx(3.5 / 4)


def test_distinct_bigrams_match_the_worked_example():
    # "a b a b" has the pairs ab, ba, ab; "c d" has cd: 3 different of 4.
    assert metrics.distinct_n(["a b a b", "c d"], n=2) == pytest.approx(3 / 4)


def test_a_neutral_summary_has_all_facts_of_its_row():
    row = corpus.rows("ppo", 1)[0]

    assert metrics.facts_share([row["summary"]], [row["facts"]]) == [1]
    assert metrics.facts_share(["nothing of it"], [row["facts"]]) == [0]


# The build


@pytest.fixture
def build_lab(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    script = Path(__file__).parent.parent / "scripts" / "build_lab.py"

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return run


def test_the_script_builds_models_that_load(
    build_lab: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    build_lab("--smoke", "--out", str(tmp_path), "--seed", "1")

    figures = capsys.readouterr().out
    assert "facts share" in figures
    assert "AUC, held-out frames" in figures
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "roberta")


def test_a_smoke_build_does_not_replace_the_shipped_models(
    build_lab: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        build_lab("--smoke")

    assert "would replace the shipped models" in capsys.readouterr().err
