"""The reward: a hate-speech classifier, and any further functions in TRL's protocol.

The score of a text is the raw logit of one label ("nothate"), looked up by name: a pipeline that
sorts labels by score, or an index that was right for another model, rewards the wrong one in
silence. Knows no policy and nothing of Ray.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ray_detox.config import ConfigError, RewardConfig, RewardTerm
from ray_detox.records import Columns, Scores
from ray_detox.sources import local_folder

RewardFunction = Callable[..., Sequence[float | None]]


class Pending(Protocol):
    """Scores that were asked for and may not be there yet."""

    def result(self) -> Scores:
        """Wait for the scores."""


class Scorer(Protocol):
    """Anything that scores responses: the reward in this process, or a pool of actors."""

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]],
        columns: Columns,
    ) -> Pending:
        """Ask for the scores of a batch, in the order given, without waiting for them.

        Args:
            prompts: [B] texts that were answered.
            responses: [B] answers, as text without special tokens.
            response_ids: [B] answers as token ids, for reward functions that count tokens.
            columns: the data's other columns, [B] each.
        """


class Ready:
    """Scores that are there already: the `Pending` of a scorer in this process."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def result(self) -> Scores:
        """The scores."""
        return self._scores


def label_index(config: dict[str, Any], label: str, where: str) -> int:
    """Index of the output that `label` names, by the model's own `id2label`.

    Args:
        config: the classifier's config.json.
        label: the wanted label; case does not matter.
        where: the model's name, for messages.

    Raises:
        ConfigError: the label is absent or ambiguous.
    """
    names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    matches = [index for index, name in names.items() if name.casefold() == label.casefold()]
    if len(matches) != 1:
        known = ", ".join(repr(names[i]) for i in sorted(names)) or "none"
        problem = "has no label" if not matches else "has more than one label"
        raise ConfigError(
            f"The classifier {where} {problem} {label!r}; its labels are {known}. "
            "Set reward.label to the one that means not toxic."
        )
    return matches[0]


class Classifier:
    """Texts to logits of one label, in batches sorted by length."""

    def __init__(self, config: RewardConfig, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        folder = local_folder(config.model, config.revision, "reward.model")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.label = label_index(settings, config.label, config.model)
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True
        )
        self.model.to(self.device).eval()
        self.batch_size = config.batch_size
        self.max_tokens = min(longest_input(self.tokenizer, settings), config.max_tokens or 1 << 30)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits of the label, 1 - its probability, and where the text was cut; each [B]."""
        rows, truncated = self.tokenize(texts)
        return *self.forward(rows), truncated

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of each text, no longer than the classifier reads, and where it was cut."""
        rows = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        truncated = np.array([len(row) > self.max_tokens for row in rows], dtype=bool)
        for i in np.flatnonzero(truncated).tolist():
            cut = self.tokenizer(texts[i], truncation=True, max_length=self.max_tokens)
            rows[i] = cut["input_ids"]
        return rows, truncated

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[list[int]], batch_tokens: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the label and 1 - its probability, each [B], of texts given as token ids.

        Args:
            rows: from `tokenize`.
            batch_tokens: most tokens in a forward pass, padding included; None takes
                `batch_size` texts instead.
        """
        logits = np.empty(len(rows), dtype=np.float32)
        toxicity = np.empty(len(rows), dtype=np.float32)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            stop = start + self.batch_size
            if batch_tokens is not None:
                # What n texts take: n times the longest, which is the last of them.
                sizes = np.arange(1, len(order) - start + 1) * lengths[order[start:]]
                stop = start + max(1, int(np.searchsorted(sizes, batch_tokens, side="right")))
            batch = order[start:stop]
            inputs = self.tokenizer.pad(
                {"input_ids": [rows[i] for i in batch]}, return_tensors="pt"
            ).to(self.device)
            output = self.model(**inputs).logits.float()
            logits[batch] = output[:, self.label].cpu().numpy()
            toxicity[batch] = 1 - output.softmax(dim=-1)[:, self.label].cpu().numpy()
            start = stop
        return logits, toxicity


def longest_input(tokenizer: Any, settings: dict[str, Any]) -> int:
    """Most tokens a classifier can read; its tokenizer does not always know."""
    positions = settings.get("max_position_embeddings") or 512
    if settings.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        # RoBERTa numbers positions from pad_token_id + 1, so that many places are never used.
        positions -= (settings.get("pad_token_id") or 0) + 1
    return int(min(positions, tokenizer.model_max_length))


def load_reward_function(term: RewardTerm) -> RewardFunction:
    """The function that a term names, made with its arguments if it has any.

    Raises:
        ConfigError: nothing is at that import path, or it is not callable so.
    """
    module, _, name = term.function.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: ".name"
        raise ConfigError(
            f"reward.terms: {term.function} cannot be imported ({error}). Give the import path of "
            "a function that every node can import."
        ) from error
    if term.arguments is not None:
        try:
            found = found(**term.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"reward.terms: {term.function} refuses its arguments {term.arguments}: {error}."
            ) from error
    if not callable(found):
        raise ConfigError(f"reward.terms: {term.function} is no function.")
    return found


def read_by(
    config: RewardConfig, prompts: Sequence[str], responses: Sequence[str]
) -> Sequence[str]:
    """The texts that the classifier reads, by `reward.reads`."""
    if config.reads == "response":
        return responses
    return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


class Reward:
    """The classifier and the extra terms together; itself a `Scorer` for one process."""

    def __init__(self, config: RewardConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.terms = [(term, load_reward_function(term)) for term in config.terms]
        self.classifier = Classifier(config, device)

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]],
        columns: Columns,
    ) -> Scores:
        """Score a batch; arguments as in `Scorer.submit`.

        Raises:
            ValueError: an extra term returned something else than one number per response.
        """
        verdict = self.classifier(read_by(self.config, prompts, responses))
        return self.add_terms(*verdict, prompts, responses, response_ids, columns)

    def add_terms(
        self,
        logits: np.ndarray,
        toxicity: np.ndarray,
        truncated: np.ndarray,
        prompts: Sequence[str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]],
        columns: Columns,
    ) -> Scores:
        """What the classifier said about a batch, with the extra terms; raises as a call does."""
        rewards = logits.copy()
        values: dict[str, np.ndarray] = {}
        for term, function in self.terms:
            # The keywords of TRL's trainers; a function takes those it knows and ignores the rest.
            answer = function(
                prompts=list(prompts),
                completions=list(responses),
                completion_ids=[list(row) for row in response_ids],
                **columns,
            )
            # None means "not applicable to this sample" in that protocol, and adds nothing.
            value = np.array([0.0 if v is None else v for v in answer], dtype=np.float32)
            if value.shape != logits.shape or not np.isfinite(value).all():
                raise ValueError(
                    f"The reward term {term.name} gave {value.shape[0]} values for "
                    f"{len(responses)} responses, or a value that is no finite number; expected "
                    "one finite number per response."
                )
            values[term.name] = value
            rewards += np.float32(term.weight) * value
        return Scores(rewards, logits, toxicity, truncated, values)

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]],
        columns: Columns,
    ) -> Pending:
        """Score now; there is no other process to hand it to."""
        return Ready(self(prompts, responses, response_ids, columns))
