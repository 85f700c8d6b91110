"""The sequence classifier behind the reward: texts to logits of one label."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ray_detox.config import ConfigError, RewardConfig
from ray_detox.models.sources import local_folder


def label_index(config: dict[str, Any], label: str, where: str) -> int:
    """Return the index of a label among the classifier's outputs, by the model's own `id2label`.

    Args:
        config: the classifier's config.json.
        label: the label to find; case does not matter.
        where: the model's name, for messages.

    Raises:
        ConfigError: no output has this label, or several have.
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
    """Computes logits of one label from texts, in batches sorted by length.

    Args:
        config: the model, the label, and the batch size.
        device: for the forward passes.
    """

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
        """Score texts.

        Returns:
            logits: [B] float32, of the label.
            toxicity: [B] float32, 1 minus the label's probability.
            truncated: [B] bool, True if the text was longer than the classifier reads.
        """
        rows, truncated = self.tokenize(texts)
        return *self.forward(rows), truncated

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], np.ndarray]:
        """Tokenize texts, and truncate those that are longer than the classifier reads.

        Returns:
            rows: [B] lists of token ids, at most `max_tokens` each.
            truncated: [B] bool, True for each text that was truncated.
        """
        # Without truncation at first: the full lengths tell which texts are too long.
        rows = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        truncated = np.array([len(row) > self.max_tokens for row in rows], dtype=bool)
        for i in np.flatnonzero(truncated).tolist():
            # By the tokenizer and not by a slice, which would lose the special token at the end.
            cut = self.tokenizer(texts[i], truncation=True, max_length=self.max_tokens)
            rows[i] = cut["input_ids"]
        return rows, truncated

    @torch.inference_mode()
    def forward(
        self, rows: Sequence[list[int]], batch_tokens: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the model on tokenized texts.

        Args:
            rows: [B] lists of token ids, from `tokenize`.
            batch_tokens: most tokens in a forward pass, padding included; None takes
                `batch_size` texts instead.

        Returns:
            logits: [B] float32, of the label.
            toxicity: [B] float32, 1 minus the label's probability.
        """
        logits = np.empty(len(rows), dtype=np.float32)
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
    """Return the most tokens that a classifier can read.

    A tokenizer without a limit in its files reports a huge number, so that the number of positions
    in the model's config.json counts as well.

    Args:
        tokenizer: of the classifier.
        settings: the classifier's config.json.
    """
    positions = settings.get("max_position_embeddings") or 512
    if settings.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        # RoBERTa numbers positions from pad_token_id + 1, and never uses those before.
        positions -= (settings.get("pad_token_id") or 0) + 1
    return int(min(positions, tokenizer.model_max_length))
