"""A sequence classifier behind the reward: texts to a score and a probability of toxicity.

    texts -> tokens -> forward pass -> logits [B, L] -> Head -> score [B], toxicity [B]

Which output is read, and how its logit becomes a probability, follows from the model's config.json
and the settings; `Head` has the formulas. How texts share a forward pass follows from a trial: see
`Classifier._find_padding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ray_detox.bounded import parse_object, read_file
from ray_detox.config import ClassifierConfig
from ray_detox.errors import ConfigError, first_line
from ray_detox.models.sizes import check_loaded, check_size_of
from ray_detox.models.sources import local_folder

DEFAULT_MAX_TOKENS = 512
"""Longest input of a model that states no limit, such as one with relative positions only."""
BOUNDARY_TOKENS = 8
"""Most tokens by which a response differs beside a prompt, where one word may span both."""
TRIAL_TEXTS = ("No.", "", "They talk about the weather, and then they go home by train.")
"""A short, an empty and a longer text, to try whether padding changes a score."""
TRIAL_TOLERANCE = 1e-4
"""Largest difference that padding may make to a logit, relative to the largest logit."""

LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    StrictDataclassError,
)
"""Errors that transformers raises for a model of an unknown type, or a damaged one."""


# ---- the head ----------------------------------------------------------------------------------


def label_names(settings: dict[str, Any], where: str) -> dict[int, str]:
    """Return the label of each output, by index.

    transformers does not write default labels into config.json; they are LABEL_0, LABEL_1 and so
    on, two unless `num_labels` says otherwise.

    Args:
        settings: the classifier's config.json.
        where: the model's name, for messages.

    Raises:
        ConfigError: `id2label` or `num_labels` does not number the outputs.
    """
    names = settings.get("id2label")
    if isinstance(names, dict) and names:
        outputs = {str(index): index for index in range(len(names))}
        if {str(index) for index in names} != outputs.keys():
            raise ConfigError(
                f"The classifier {where} has id2label {names} in its config.json; expected the keys 0 "
                f"to {len(names) - 1}, one per output. Correct config.json."
            )
        return {outputs[str(index)]: str(name) for index, name in names.items()}
    count = settings.get("num_labels") or 2
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"The classifier {where} has num_labels {count!r} in its config.json; expected a positive "
            "whole number. Correct config.json."
        )
    return {index: f"LABEL_{index}" for index in range(count)}


def label_index(
    settings: dict[str, Any], label: str, where: str, setting: str = "reward.label"
) -> int:
    """Return the index of a label among the classifier's outputs, by the model's own labels.

    Args:
        settings: the classifier's config.json.
        label: the label to find; case matters only between labels that differ in nothing else.
        where: the model's name, for messages.
        setting: the setting that names the label, for messages.

    Raises:
        ConfigError: no output has this label, or several have.
    """
    names = label_names(settings, where)
    exact = [index for index, name in names.items() if name == label]
    matches = exact or [i for i, name in names.items() if name.casefold() == label.casefold()]
    if len(matches) != 1:
        known = ", ".join(repr(names[i]) for i in sorted(names))
        problem = "has no label" if not matches else "has more than one label"
        meaning = "toxic" if setting.endswith("toxic_label") else "not toxic"
        raise ConfigError(
            f"The classifier {where} {problem} {label!r}; its labels are {known}. "
            f"Set {setting} to the one that means {meaning}."
        )
    return matches[0]


@dataclass(frozen=True, slots=True)
class Head:
    """The rule that reads a score and a toxicity from the logits z of a text.

    | label | activation | score | toxicity |
    |---|---|---|---|
    | L means not toxic | softmax | z_L | 1 - softmax(z)_L |
    | L means not toxic | sigmoid | z_L | 1 - sigmoid(z_L) |
    | T means toxic | sigmoid | -z_T | sigmoid(z_T) |
    | T means toxic | softmax, two labels | z of the other label | softmax(z)_T |
    | T means toxic | softmax, more labels | log(1 - p) - log(p) with p = toxicity | softmax(z)_T |

    With two labels, naming either of them gives the same score: the raw logit of the one that means
    not toxic, as in the published method. In all rows with a sigmoid, and in the last one, the
    score is the log-odds of not toxic, so that it falls as toxicity rises.
    """

    index: int
    """Output of the label."""
    toxic: bool
    """True if the label means toxic."""
    activation: Literal["softmax", "sigmoid"]

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return score [B] and toxicity [B] for logits [B, L], all float32."""
        own = logits[:, self.index]
        if self.activation == "sigmoid":
            score = -own if self.toxic else own
            return score, (-score).sigmoid()
        probability = logits.softmax(dim=-1)[:, self.index]
        if not self.toxic:
            return own, 1 - probability
        others = torch.cat([logits[:, : self.index], logits[:, self.index + 1 :]], dim=1)
        if others.shape[1] == 1:
            return others[:, 0], probability
        return others.logsumexp(dim=-1) - own, probability


def read_head(settings: dict[str, Any], config: ClassifierConfig, setting: str) -> Head:
    """Return the head that a classifier's config.json and the settings describe.

    Args:
        settings: the classifier's config.json.
        config: names the label.
        setting: the setting that describes the classifier, such as `reward`, for messages.

    Raises:
        ConfigError: the model does not have the label, or its outputs are no logits.
    """
    name = "toxic_label" if config.toxic_label is not None else "label"
    label = config.toxic_label or config.label
    assert label is not None, "ClassifierConfig has one of the two"
    index = label_index(settings, label, config.model, f"{setting}.{name}")
    outputs, kind = len(label_names(settings, config.model)), settings.get("problem_type")
    activation = config.head
    if activation == "auto":
        if kind == "regression":
            raise ConfigError(
                f"{setting}.model is {config.model!r}, a regression (its problem_type), so its output "
                f"is no logit of {label!r}. Set {setting}.head=sigmoid to read it as one, or choose a "
                "classifier."
            )
        is_sigmoid = kind == "multi_label_classification" or outputs == 1
        activation = "sigmoid" if is_sigmoid else "softmax"
    elif activation == "softmax" and outputs == 1:
        raise ConfigError(
            f"{setting}.head is 'softmax', and {config.model} has one output, whose softmax is 1 for "
            f"every text. Set {setting}.head=sigmoid."
        )
    return Head(index, config.toxic_label is not None, activation)


# ---- the model ---------------------------------------------------------------------------------


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a model's config.json."""
    return parse_object(read_file(folder / "config.json"))


def load_model(folder: Path, name: str, setting: str, *, weights: bool = True) -> Any:
    """Load a classifier in float32.

    float32 also for checkpoints in half precision: in that, a score depends on the texts that share
    its forward pass.

    Args:
        folder: of the model.
        name: of the model, for messages.
        setting: the setting that names it, for messages.
        weights: False builds the model on the meta device, from config.json alone.

    Raises:
        ConfigError: transformers cannot build the model, or weights are missing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    info: dict[str, Any] = {"missing_keys": (), "mismatched_keys": ()}
    try:
        if weights:
            check_size_of(AutoModelForSequenceClassification, folder, name, setting)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the shapes
                trust_remote_code=False,
            )
        else:
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(
                    AutoConfig.from_pretrained(folder, trust_remote_code=False),
                    trust_remote_code=False,
                )
    except ConfigError:
        raise
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"{setting} is {name!r}, and it cannot be loaded as a sequence classifier "
            f"({type(error).__name__}: {first_line(error)}). Set it to a model that this version of "
            "transformers can load."
        ) from error
    check_loaded(info, name, setting)
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a classifier; see also `check_vocabulary`.

    A response that spells a special token, such as `</s>` or `<pad>`, gets the tokens of these
    characters: as the special token it would end the text for some models, and BART would fail.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, split_special_tokens=True)


def check_vocabulary(tokenizer: Any, model: Any, name: str, setting: str) -> None:
    """Check that the model has an embedding for every token of its tokenizer.

    Raises:
        ConfigError: tokens were added, and the model was not resized.
    """
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # such as a model that reads characters
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ConfigError(
            f"{setting} is {name!r}, whose tokenizer has ids up to {largest} and whose model has "
            f"{rows} embeddings. Save the model again after "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def position_limits(model: Any) -> list[int]:
    """Return the number of positions in each table of position embeddings of a model or a part of it."""
    limits = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        table = getattr(module, "weight", None)
        is_positions = ("position" in leaf or leaf == "wpe") and not isinstance(module, nn.Linear)
        grows = hasattr(module, "make_weight")  # FSMT makes a longer table when it needs one
        if is_positions and not grows and isinstance(table, Tensor) and table.ndim == 2:
            padding = getattr(module, "padding_idx", None)
            unused = max(getattr(module, "offset", 0), 0 if padding is None else padding + 1)
            limits.append(len(table) - unused)
    return limits


def longest_input(tokenizer: Any, model: Any) -> int:
    """Return the most tokens that a classifier can read.

    It is the smallest of three limits, as far as they are known: the tokenizer's, the config's, and
    that of each table of position embeddings. RoBERTa and its relatives number positions from the
    padding index + 1, and BART's tables begin with unused rows (`offset`).

    Args:
        tokenizer: of the classifier.
        model: the classifier; weights are not read.
    """
    limits = position_limits(model)
    stated = getattr(model.config, "max_position_embeddings", None)  # also GPT-2's n_positions
    if isinstance(stated, int) and stated > 0:
        limits.append(stated)
    # A tokenizer without a limit in its files reports a huge number.
    if tokenizer.model_max_length < 1 << 30:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=DEFAULT_MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The model's inputs for one text, without padding; its `len` is the number of tokens."""

    inputs: dict[str, list[int]]
    """`input_ids`, and `token_type_ids` if the tokenizer gives others than zero, every model's
    default."""

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


class Classifier:
    """Computes score and toxicity of texts, in batches sorted by length.

    Args:
        config: the model, the label, and the batch size.
        device: for the forward passes.
        setting: the setting that describes the classifier, such as `reward`, for messages.

    Raises:
        ConfigError: the model cannot be loaded, or does not have the label.
    """

    def __init__(
        self, config: ClassifierConfig, device: torch.device | str = "cpu", setting: str = "reward"
    ) -> None:
        name = f"{setting}.model"
        folder = local_folder(config.model, config.revision, name)
        self.config = config
        self.head = read_head(read_settings(folder), config, setting)
        self.device = torch.device("cpu")
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, config.model, name)
        check_vocabulary(self.tokenizer, self.model, config.model, name)
        self.batch_size = config.batch_size
        self.max_tokens = min(
            longest_input(self.tokenizer, self.model), config.max_tokens or 1 << 30
        )
        try:
            self.pads = self._find_padding()
        except LOAD_ERRORS as error:
            raise ConfigError(
                f"{name} is {config.model!r}, and it cannot score a text from its tokens alone "
                f"({type(error).__name__}: {first_line(error)}). Set it to a classifier of texts."
            ) from error
        """True if texts of different lengths share a forward pass; else each has its own."""
        self.device = torch.device(device)
        self.model.to(self.device)

    @property
    def label(self) -> int:
        """Output whose label the settings name."""
        return self.head.index

    def __call__(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Score texts; see `tokenize` for the arguments.

        Returns:
            scores: [B] float32, see `Head`.
            toxicity: [B] float32, see `Head`.
            truncated: [B] bool, True if the text was longer than the classifier reads.
        """
        rows, truncated = self.tokenize(texts, prompts)
        return *self.forward(rows), truncated

    def tokenize(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> tuple[list[TokenizedText], np.ndarray]:
        """Tokenize texts, and truncate those that are longer than the classifier reads.

        A text alone loses its end. A text with a prompt loses the beginning of the prompt, so that
        the response and what is next to it remain.

        Args:
            texts: [B] texts.
            prompts: [B] prompts that precede the texts; None if there are none.

        Returns:
            rows: [B] tokenized texts, at most `max_tokens` each.
            truncated: [B] bool, True for each text that was truncated.
        """
        whole = [a + b for a, b in zip(prompts, texts, strict=True)] if prompts else list(texts)
        # Without truncation at first: the full lengths tell which texts are too long.
        rows = self._encode(whole)
        truncated = np.array([len(row) > self.max_tokens for row in rows], dtype=bool)
        for i in np.flatnonzero(truncated).tolist():
            side, text = "right", texts[i]
            if prompts and len(self._encode([text])[0]) <= self.max_tokens - BOUNDARY_TOKENS:
                side, text = "left", whole[i]
            (rows[i],) = self._encode([text], truncation_side=side)
        return rows, truncated

    def _encode(
        self, texts: Sequence[str], truncation_side: str | None = None
    ) -> list[TokenizedText]:
        """Tokenize texts, truncated to `max_tokens` on the given side, or not if it is None."""
        options: dict[str, Any] = {"truncation": False}
        if truncation_side is not None:
            # By the tokenizer and not by a slice, which would lose the special tokens at an end.
            self.tokenizer.truncation_side = truncation_side
            options = {"truncation": True, "max_length": self.max_tokens}
        encoded = self.tokenizer(list(texts), verbose=False, **options)
        types = encoded.get("token_type_ids")
        return [
            TokenizedText(
                {"input_ids": ids or [self._token_of_empty_text()]}
                | ({"token_type_ids": types[i]} if types and any(types[i]) else {})
            )
            for i, ids in enumerate(encoded["input_ids"])
        ]

    def _token_of_empty_text(self) -> int:
        """Return the token that stands for "" if the tokenizer adds no special tokens.

        No model can run on a row without tokens: alone it has no shape, in a batch it is padding.
        """
        tokenizer = self.tokenizer
        special = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.unk_token_id,
            tokenizer.pad_token_id,
        )
        return next((token for token in special if token is not None), 0)

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[TokenizedText], batch_tokens: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the model on tokenized texts.

        Args:
            rows: [B] tokenized texts, from `tokenize`.
            batch_tokens: most tokens in a forward pass, padding included; None takes
                `batch_size` texts instead.

        Returns:
            scores: [B] float32, see `Head`.
            toxicity: [B] float32, see `Head`.
        """
        scores = np.empty(len(rows), dtype=np.float32)
        toxicity = np.empty(len(rows), dtype=np.float32)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # Similar lengths share a forward pass, so that little of it is padding. A stable sort,
        # so that equal lengths keep their order and the same texts always share a pass.
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            stop = start + self.batch_size
            if batch_tokens is not None:
                # The next n texts take n times the longest, which is the last of them. A single
                # text may exceed batch_tokens, because no pass can hold less than one.
                sizes = np.arange(1, len(order) - start + 1) * lengths[order[start:]]
                stop = start + max(1, int(np.searchsorted(sizes, batch_tokens, side="right")))
            if not self.pads:
                stop = start + 1
            batch = order[start:stop]
            score, toxic = self.head.read(self._logits([rows[i] for i in batch]))
            scores[batch], toxicity[batch] = score.cpu().numpy(), toxic.cpu().numpy()
            start = stop
        return scores, toxicity

    def _logits(self, rows: Sequence[TokenizedText]) -> Tensor:
        """Run the model once; return logits [B, L] float32."""
        if len(rows) == 1:  # without `pad`, because a tokenizer may have no padding token
            inputs = {name: torch.tensor([ids]) for name, ids in rows[0].inputs.items()}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        else:
            columns = {name: [row.inputs[name] for row in rows] for name in rows[0].inputs}
            inputs = dict(self.tokenizer.pad(columns, return_tensors="pt"))
        inputs = {name: ids.to(self.device) for name, ids in inputs.items()}
        logits: Tensor = self.model(**inputs).logits.float()
        return logits

    @torch.inference_mode()
    def _find_padding(self) -> bool:
        """Set up the tokenizer's padding so that it changes no score; return whether it can.

        Models differ: GPT-2 has no padding token and numbers positions from the left, XLNet reads
        the last token, some mix the tokens of a batch. A trial decides, for the tokenizer's own
        padding, then for padding on the right, then with the end-of-sequence token. If padding
        changes a score in each of them, every text gets its own forward pass.
        """
        tokenizer, config = self.tokenizer, self.model.config.get_text_config()
        rows, _ = self.tokenize(TRIAL_TEXTS)
        alone = torch.cat([self._logits([row]) for row in rows])
        own = (tokenizer.pad_token, tokenizer.padding_side, config.pad_token_id)
        end = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
        for token, side in dict.fromkeys((own[:2], (own[0], "right"), (end, "right"))):
            if token is None:
                continue
            tokenizer.pad_token, tokenizer.padding_side = token, side
            config.pad_token_id = tokenizer.pad_token_id
            try:
                together = self._logits(rows)
            except (ValueError, LookupError, RuntimeError):  # the model cannot pad this way
                continue
            tolerance = TRIAL_TOLERANCE * max(1.0, float(alone.abs().max()))
            if float((together - alone).abs().max()) <= tolerance:
                return True
        if own[0] is not None:
            tokenizer.pad_token = own[0]
        tokenizer.padding_side, config.pad_token_id = own[1:]
        return False
