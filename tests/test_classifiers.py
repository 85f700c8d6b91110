"""The contract of a classifier, on tiny builds of many architectures of transformers.

Alone equals in a batch equals plain transformers; a text of any length can be scored; arithmetic is
float32 whatever the checkpoint; the label is found. Architectures break each of these in a way of
their own: no padding token, positions that begin at 2, tokens that mix with their neighbours.
"""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ray_detox.config import ClassifierConfig, ConfigError, RewardConfig
from ray_detox.models.classifier import Classifier
from ray_detox.records import ScoreRequest
from ray_detox.rewards.reward import Reward

POSITIONS = 40
TEXTS = ["you are kind", "you fool", "", "a longer text, which goes on", "ü?"]
SIZES = {
    "vocab_size": 260,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "id2label": {0: "nothate", 1: "hate"},
    "label2id": {"nothate": 0, "hate": 1},
    "decoder_start_token_id": 2,
}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
ARCHITECTURES = {
    "albert": BERT | {"embedding_size": 16},
    "bart": BART,
    "bert": BERT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "camembert": BERT,
    "convbert": BERT | {"embedding_size": 32},
    "data2vec-text": BERT,
    "deberta": BERT,
    "deberta-v2": BERT,
    "distilbert": DISTILBERT | {"max_position_embeddings": POSITIONS},
    "electra": BERT | {"embedding_size": 16},
    "fnet": BERT,
    "gemma2": LLAMA,
    "gpt2": GPT,
    "gpt_neox": BERT,
    "ibert": BERT,
    "llama": LLAMA,
    "longformer": BERT | {"attention_window": 8},
    "mbart": BART,
    "mobilebert": BERT,
    "modernbert": BERT,
    "mpnet": BERT,
    "mt5": T5,
    "nystromformer": BERT,
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    | {"word_embed_proj_dim": 32, "max_position_embeddings": POSITIONS},
    "qwen2": LLAMA,
    "rembert": BERT,
    "roberta": BERT,
    "roberta-prelayernorm": BERT,
    "t5": T5,
    "xlm-roberta": BERT,
    "xlnet": XLNET,
}
OFFSET_BY_PADDING = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
}
"""Architectures that number positions from the padding token's id + 1."""
MIX_WITH_PADDING = {"convbert", "fnet", "mobilebert", "nystromformer", "xlnet"}
"""Architectures in which padding on the right changes a score."""
RELATIVE = {"bloom", "mt5", "t5", "xlnet"}
"""Architectures without a largest number of positions."""


def save(folder, kind, *, padding=True, template="<s> $A </s>", half=True, **changes):
    """Save a random classifier with large weights, so that a wrong input changes a score."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **(SIZES | ARCHITECTURES[kind] | changes))
    model = AutoModelForSequenceClassification.from_config(settings)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    (model.half() if half else model).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"pad_token": "<pad>"} if padding else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def scores_of_transformers(folder, texts, max_tokens, **options):
    """Score texts one by one as the library's own documentation does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    for text in texts:
        inputs = tokenizer(
            text, truncation=True, max_length=max_tokens, return_tensors="pt", **options
        )
        with torch.no_grad():
            scores.append(float(model(**inputs).logits[0, 0]))
    return scores


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_score_depends_on_its_text_alone_and_is_that_of_transformers(tmp_path, kind):
    folder = save(tmp_path, kind)
    texts = [*TEXTS, "x" * 3000]

    classifier = Classifier(ClassifierConfig(model=str(folder)))
    scores, toxicity, truncated = classifier(texts)

    expected = POSITIONS - 2 if kind in OFFSET_BY_PADDING else POSITIONS
    assert classifier.max_tokens == (512 if kind in RELATIVE else expected)
    assert classifier.head.index == 0
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert classifier.pads == (kind not in MIX_WITH_PADDING)
    alone = [classifier([text])[0][0] for text in texts]
    np.testing.assert_allclose(scores, alone, atol=1e-4)
    plain = scores_of_transformers(
        folder, texts, classifier.max_tokens, return_token_type_ids=False
    )
    np.testing.assert_allclose(scores, plain, atol=1e-4)
    assert np.ptp(scores) > 1e-3
    assert truncated.tolist() == [False] * 5 + [True]
    assert ((toxicity >= 0) & (toxicity <= 1)).all()


@pytest.mark.parametrize("template, pads", [("$A", True), ("<s> $A </s>", False)])
def test_gpt2_without_a_padding_token_is_padded_with_one_that_no_text_ends_with(
    tmp_path, template, pads
):
    folder = save(tmp_path, "gpt2", padding=False, template=template, pad_token_id=None)
    texts = [text for text in TEXTS if text]

    classifier = Classifier(ClassifierConfig(model=str(folder)))

    assert classifier.pads is pads
    np.testing.assert_allclose(
        classifier(texts)[0], scores_of_transformers(folder, texts, POSITIONS), atol=1e-4
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "opt", "roberta", "xlnet"])
def test_an_empty_text_has_a_score_without_special_tokens(tmp_path, kind):
    classifier = Classifier(ClassifierConfig(model=str(save(tmp_path, kind, template="$A"))))

    rows, truncated = classifier.tokenize(["", "abc"])
    alone = [classifier(texts)[0][0] for texts in ([""], ["", ""], ["<"])]

    assert rows[0].inputs["input_ids"] == [SIZES["bos_token_id"]]
    assert not truncated.any()
    assert np.isfinite(alone).all()
    assert alone[0] == pytest.approx(alone[1], abs=1e-4)
    assert classifier(["", "abc"])[0][0] == pytest.approx(alone[0], abs=1e-4)
    assert alone[0] != pytest.approx(alone[2], abs=1e-3)


def test_token_types_of_xlnet_are_kept(tmp_path):
    folder = save(tmp_path, "xlnet", template="$A:0 </s>:0 <s>:2")

    scores = Classifier(ClassifierConfig(model=str(folder)))(TEXTS)[0]

    np.testing.assert_allclose(scores, scores_of_transformers(folder, TEXTS, 512), atol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "roberta", "llama"])
def test_a_text_that_spells_a_special_token_is_plain_text(tmp_path, kind):
    classifier = Classifier(ClassifierConfig(model=str(save(tmp_path, kind))))

    rows, _ = classifier.tokenize(["a</s>", "a<pad>"])
    scores, *_ = classifier(["a", "a</s>", "a</s>b", "a<pad>", "<s>"])

    assert [len(row) for row in rows] == [2 + 5, 2 + 6]
    assert len(set(scores.tolist())) == 5


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_a_checkpoint_in_half_precision_is_computed_in_float32(tmp_path, batch_size):
    folder = save(tmp_path, "roberta")
    texts = [f"{text} {i}" for i in range(8) for text in TEXTS]

    scores = Classifier(ClassifierConfig(model=str(folder), batch_size=batch_size))(texts)[0]
    alone = Classifier(ClassifierConfig(model=str(folder), batch_size=1))(texts)[0]

    np.testing.assert_allclose(scores, alone, atol=5e-6)


# ---- the prompt is cut, and never the response ---------------------------------------------------


def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path):
    classifier = Classifier(ClassifierConfig(model=str(save(tmp_path, "roberta"))))
    read = classifier.max_tokens - 2  # bytes beside the two special tokens

    rows, truncated = classifier.tokenize(["ok fine", "ok fine"], ["p" * 99 + "END:", "END:"])

    text = classifier.tokenizer.decode(rows[0].inputs["input_ids"], skip_special_tokens=True)
    assert text == ("p" * 99 + "END:ok fine")[-read:]
    assert rows[0].inputs["input_ids"][0] == 0
    assert rows[0].inputs["input_ids"][-1] == 2
    assert truncated.tolist() == [True, False]


def test_a_response_that_is_too_long_is_scored_without_its_prompt_and_loses_its_end(tmp_path):
    classifier = Classifier(ClassifierConfig(model=str(save(tmp_path, "roberta"))))

    (both, alone), truncated = classifier.tokenize(["r" * 50 + "END"] * 2, ["prompt", ""])

    assert both.inputs == alone.inputs == classifier.tokenize(["r" * 50])[0][0].inputs
    assert truncated.tolist() == [True, True]


@pytest.mark.parametrize("length", [1, 20, 29, 30, 31, 36, 37, 38])
def test_a_response_is_whole_whenever_it_fits(tmp_path, length):
    classifier = Classifier(ClassifierConfig(model=str(save(tmp_path, "roberta"))))
    response = "".join(chr(97 + i % 26) for i in range(length))

    (row,), _ = classifier.tokenize([response], ["p" * 100])

    text = classifier.tokenizer.decode(row.inputs["input_ids"], skip_special_tokens=True)
    kept = min(length, classifier.max_tokens - 2)
    assert text.endswith(response[:kept])


def test_an_insult_and_a_thank_you_differ_after_a_prompt_of_any_length():
    reward = Reward(RewardConfig(input="prompt+response"))
    responses = ["You are a stupid fool.", "Thank you for your help."]

    for words in (1, 100, 2000):
        request = ScoreRequest(["They talk. " * words] * 2, responses, [[1]] * 2, {})
        scores = reward(request)
        assert scores.toxicity[0] > scores.toxicity[1] + 0.5
        assert scores.truncated.tolist() == [words == 2000] * 2


# ---- models that cannot be a reward --------------------------------------------------------------


def refused(folder, **settings):
    with pytest.raises(ConfigError) as error:
        Classifier(ClassifierConfig(model=str(folder), **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path):
    change(save(tmp_path, "bert"), model_type="bert9")

    assert "cannot be loaded as a sequence classifier (ValueError: " in refused(tmp_path)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if not k.startswith("classifier")}
    save_file(weights, file, metadata={"format": "pt"})

    sentence = refused(tmp_path)

    assert "have no weights for classifier.bias and 1 more" in sentence


def test_labels_that_do_not_fit_the_head_are_refused_with_the_shapes(tmp_path):
    change(save(tmp_path, "roberta"), id2label={"0": "nothate", "1": "b", "2": "c"})

    sentence = refused(tmp_path)

    assert (
        "classifier.out_proj.bias has shape (2,), and config.json (labels, sizes) descri"
        in sentence
    )


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save(tmp_path, "roberta"))
    tokenizer.add_tokens(["#Person1#"])
    tokenizer.save_pretrained(tmp_path)

    sentence = refused(tmp_path)

    assert "whose tokenizer has ids up to 260 and whose model has 260 embeddings" in sentence
    assert "resize_token_embeddings" in sentence
