"""Train the two embedded models on the generated corpus, and measure them.

    corpus texts -> byte-level BPE -> T5       dialogue -> summary, as insulting as its references
                                   -> RoBERTa  text -> nothate | hate

This needs torch and takes minutes; run it with `scripts/build_lab.py`. Using the models needs
nothing from this module: they load like any other model from `lab.T5` and `lab.ROBERTA`.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

from ray_detox.evaluation import metrics
from ray_detox.lab import corpus, sentences

logger = logging.getLogger(__name__)

VOCABULARY_SIZE = 2048
MAX_TOKENS = 512
MAX_NEW_TOKENS = 48
NOTEBOOK_SENTENCES = (
    "You are a great person and i like you.",
    "You are a terrible person and i hate you.",
)


@dataclass(frozen=True, slots=True)
class Effort:
    """The amount of training and measuring in a build."""

    summariser_steps: int = 1_500
    """Batches of 32 dialogues, none seen twice."""
    classifier_texts: int = 24_000
    classifier_epochs: int = 3
    measured_rows: int = 400
    """Rows of held-out stories to measure the models on."""


SMOKE = Effort(summariser_steps=12, classifier_texts=1_500, classifier_epochs=1, measured_rows=24)
"""The least that runs every part once; the models are not usable."""


def build(out: Path, effort: Effort, seed: int) -> dict[str, float]:
    """Train both models into `out`/t5 and `out`/roberta and return their held-out metrics."""
    started = time.perf_counter()

    tokenizer = train_roberta_tokenizer()
    save(train_classifier(tokenizer, effort, seed), tokenizer, out / "roberta")
    tokenizer = train_t5_tokenizer()
    save(train_summariser(tokenizer, effort, seed), tokenizer, out / "t5")

    trained = time.perf_counter() - started
    return measure(out, effort.measured_rows, seed) | {"training seconds": trained}


# Tokenizers


def train_t5_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer with T5's special tokens (pad 0, eos 1) and an eos after every text."""
    tokenizer = _train_bpe(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def train_roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer with RoBERTa's special tokens (bos 0, pad 1, eos 2) around every text."""
    tokenizer = _train_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE: it encodes and decodes any text without loss or unknown tokens."""
    tokenizer = Tokenizer(models.BPE())
    # "#Person1#" is one word, each digit is one, and a space belongs to the word after it.
    words = r" ?#Person\d+#|'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return tokenizer


def _tokenizer_texts() -> Iterator[str]:
    for row in corpus.rows("sft", 8_000):
        yield corpus.PROMPT_TEMPLATE.format(dialogue=row["dialogue"])
        yield row["summary"]
    for text, _ in corpus.labelled_texts(8_000, seed=0):
        yield text
    # Eight copies of each: enough to learn their pieces, and few beside the corpus's own words.
    for word in sentences.ORDINARY_WORDS.split():
        yield f" {word}" * 8


# Training


def train_summariser(
    tokenizer: PreTrainedTokenizerFast, effort: Effort, seed: int
) -> T5ForConditionalGeneration:
    """Train a new T5 to summarise dialogues like their references, insults included."""
    torch.manual_seed(seed)
    model = new_t5(len(tokenizer))
    batches = _summariser_batches(tokenizer, effort.summariser_steps, seed)
    _train(model, batches, effort.summariser_steps, learning_rate=2e-3, label="summariser")
    return model


def train_classifier(
    tokenizer: PreTrainedTokenizerFast, effort: Effort, seed: int
) -> RobertaForSequenceClassification:
    """Train a new RoBERTa to classify texts as `nothate` or `hate`."""
    torch.manual_seed(seed)
    model = new_roberta(len(tokenizer))
    texts = corpus.labelled_texts(effort.classifier_texts, seed)
    steps = effort.classifier_epochs * (effort.classifier_texts // 64)
    batches = _classifier_batches(tokenizer, texts, effort.classifier_epochs, seed)
    _train(model, batches, steps, learning_rate=1e-3, label="classifier")
    return model


def new_t5(vocabulary_size: int) -> T5ForConditionalGeneration:
    """An untrained T5 in the layout of v1.1 and FLAN: gated, with an untied output head."""
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    # transformers 5 ties the head to the embedding, whose standard deviation of 1 gives logits
    # of standard deviation sqrt(d_model); this untied head starts with logits of about 1.
    head = torch.randn(vocabulary_size, model.config.d_model) * model.config.d_model**-0.5
    model.lm_head.weight = nn.Parameter(head)
    return model


def new_roberta(vocabulary_size: int) -> RobertaForSequenceClassification:
    """An untrained classifier with the labels of facebook/roberta-hate-speech-dynabench-r4."""
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=vocabulary_size,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=MAX_TOKENS + 2,
            type_vocab_size=1,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            id2label={0: "nothate", 1: "hate"},
            label2id={"nothate": 0, "hate": 1},
        )
    )


Batch = dict[str, Tensor]
Label = TypeVar("Label", int, str)


def _summariser_batches(
    tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> Iterator[Batch]:
    rows = corpus.rows("sft", 32 * steps)
    examples = [
        (corpus.PROMPT_TEMPLATE.format(dialogue=row["dialogue"]), row["summary"]) for row in rows
    ]
    for batch in _batches_of_like_length(examples, 32, Random(f"summariser {seed}")):
        prompts, summaries = zip(*batch, strict=True)
        encoded = tokenizer(list(prompts), padding=True, return_tensors="pt")
        labels = tokenizer(list(summaries), padding=True, return_tensors="pt")
        yield {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
        }


def _classifier_batches(
    tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, int]], epochs: int, seed: int
) -> Iterator[Batch]:
    rng = Random(f"classifier {seed}")
    for _ in range(epochs):
        for batch in _batches_of_like_length(texts, 64, rng):
            encoded = tokenizer(
                [text for text, _ in batch], padding=True, truncation=True, return_tensors="pt"
            )
            yield {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": torch.tensor([label for _, label in batch]),
            }


def _batches_of_like_length(
    examples: Sequence[tuple[str, Label]], size: int, rng: Random
) -> Iterator[list[tuple[str, Label]]]:
    """Full batches in random order, each of texts of similar length, so there is little padding."""
    shuffled = rng.sample(examples, len(examples))
    ordered = sorted(shuffled, key=lambda example: len(example[0]) // 20)
    starts = list(range(0, len(ordered) - size + 1, size))
    rng.shuffle(starts)
    for start in starts:
        yield ordered[start : start + size]


def _train(
    model: PreTrainedModel, batches: Iterator[Batch], steps: int, learning_rate: float, label: str
) -> None:
    """Train with AdamW, a warm-up and a linear decay to zero."""
    model.train()
    loss_of = nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.02)
    is_classifier = isinstance(model, RobertaForSequenceClassification)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, min(100, steps // 4), steps)
    started, losses = time.perf_counter(), []
    for step, batch in enumerate(islice(batches, steps), start=1):
        output = model(**batch)
        # The T5 keeps its own loss: trained with smoothing, it would sometimes sample nonsense.
        loss = loss_of(output.logits, batch["labels"]) if is_classifier else output.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            seconds = time.perf_counter() - started
            logger.info("%s %4d/%d | loss %.3f | %.0f s", label, step, steps, recent, seconds)
    model.eval()


# Saving


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save both so that releases 4 and 5 of transformers load the same model."""
    model.save_pretrained(folder)
    # The last call in training left padding and truncation enabled.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    if isinstance(model, T5ForConditionalGeneration):
        # Without this key, transformers ties the T5's head to the embedding and scales it.
        _set_in_json(folder / "config.json", "tie_word_embeddings", False)
    # transformers 5 writes a class name that release 4 does not know.
    _set_in_json(folder / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")
    for file in folder.iterdir():
        # save_pretrained makes weights readable by their owner only, but every user of the
        # installed package reads them.
        file.chmod(0o644)
    logger.info("%s saved to %s", type(model).__name__, folder)


def _set_in_json(file: Path, key: str, value: object) -> None:
    content = json.loads(file.read_text())
    content[key] = value
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# Measuring


def measure(out: Path, n: int, seed: int) -> dict[str, float]:
    """Held-out metrics of the saved models."""
    return (
        measure_classifier(out / "roberta", seed)
        | measure_summariser(out, n, seed)
        | {"megabytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6}
    )


def measure_classifier(folder: Path, seed: int, n: int = 1_000) -> dict[str, float]:
    """Metrics on sentences of unseen frames, on unseen summaries, and on two fixed sentences."""
    sentence_pairs = corpus.held_out_texts(n, seed + 1)
    conflicts = [c for c in corpus.conversations("ppo", n) if c.insulting]
    summary_pairs = [(c.neutral, 0) for c in conflicts] + [(str(c.insulting), 1) for c in conflicts]
    measured: dict[str, float] = {}
    for name, pairs in (("held-out frames", sentence_pairs), ("summaries", summary_pairs)):
        texts, labels = zip(*pairs, strict=True)
        logits = score(folder, texts)
        margins, hateful = logits[:, 1] - logits[:, 0], torch.tensor(labels) == 1
        measured[f"AUC, {name}"] = auc(margins, hateful)
        measured[f"accuracy, {name}"] = ((margins > 0) == hateful).float().mean().item()
    for sentence, logits in zip(NOTEBOOK_SENTENCES, score(folder, NOTEBOOK_SENTENCES), strict=True):
        measured[f"nothate logit, {sentence!r}"] = logits[0].item()
        measured[f"hate logit, {sentence!r}"] = logits[1].item()
    return measured


def measure_summariser(out: Path, n: int, seed: int) -> dict[str, float]:
    """Metrics of summaries sampled for unseen dialogues, with the classifier's toxicity."""
    kept = [row for row in corpus.rows("ppo", n) if 200 < len(row["dialogue"]) <= 1000]
    summaries = sample(out / "t5", [row["dialogue"] for row in kept], seed)
    hate = score(out / "roberta", summaries).softmax(dim=1)[:, 1]
    insulting = torch.tensor([corpus.is_insulting(summary) for summary in summaries])
    overlaps = metrics.rouge_l(summaries, [[row["summary"]] for row in kept])
    facts = metrics.facts_share(summaries, [row["facts"] for row in kept])
    return {
        "sampled summaries": len(summaries),
        "toxicity, mean P(hate)": hate.mean().item(),
        "toxicity, share above 1/2": (hate > 0.5).float().mean().item(),
        "classifier agrees with the word list": ((hate > 0.5) == insulting).float().mean().item(),
        "ROUGE-L against neutral references": sum(overlaps) / len(overlaps),
        "facts share": sum(facts) / len(facts),
        "distinct summaries": metrics.unique_share(summaries),
        "distinct-2": metrics.distinct_n(summaries, n=2),
        "words": sum(len(summary.split()) for summary in summaries) / len(summaries),
    }


@torch.no_grad()
def sample(folder: Path, dialogues: Sequence[str], seed: int) -> list[str]:
    """Sample one summary per dialogue from the model's own distribution."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(seed)
    summaries: list[str] = []
    for batch in _chunks(dialogues, 64):
        prompts = [corpus.PROMPT_TEMPLATE.format(dialogue=dialogue) for dialogue in batch]
        encoded = tokenizer(prompts, padding=True, return_tensors="pt")
        ids = model.generate(
            **encoded, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )
        summaries += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return summaries


@torch.no_grad()
def score(folder: Path, texts: Sequence[str]) -> Tensor:
    """[B, 2] logits of nothate and hate."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
    return torch.cat(
        [
            model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt")).logits
            for batch in _chunks(texts, 64)
        ]
    )


def auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    differences = scores[positive][:, None] - scores[~positive][None, :]
    return ((differences > 0).float() + 0.5 * (differences == 0).float()).mean().item()


def _chunks(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
