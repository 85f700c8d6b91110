"""The reward: a classifier, and any further classifiers and functions in TRL's protocol.

The score of a text is what the classifier says of one label ("nothate"), and the reward looks that
label up by its name. A fixed index that was right for another model, or a pipeline that sorts labels
by score, would reward the wrong label without an error. This module knows no policy and no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ray_detox.config import RewardConfig
from ray_detox.models.classifier import Classifier, TokenizedText
from ray_detox.records import Pending, ScoreRequest, Scores
from ray_detox.rewards.functions import FunctionCaller, load_reward_function


class Ready:
    """Scores that are complete: the `Pending` of a scorer in this process."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def result(self) -> Scores:
        """Return the scores."""
        return self._scores


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The texts of a batch, tokenized for every classifier of the reward."""

    rows: list[list[TokenizedText]]
    """By classifier, [B] each."""
    truncated: np.ndarray
    """[B] bool, True if a classifier could not read the whole text."""

    def __len__(self) -> int:
        """Tokens of all texts, for all classifiers."""
        return sum(len(row) for rows in self.rows for row in rows)


Outputs = list[tuple[np.ndarray, np.ndarray]]
"""By classifier: score [B] and toxicity [B], both float32."""


class Reward:
    """All parts of the reward together; itself a `Scorer` within one process.

    `classifiers` holds the one of `reward.model`, which measures toxicity, and then those of the
    terms, in their order.
    """

    def __init__(self, config: RewardConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self._functions = [
            (term, load_reward_function(term)) for term in config.terms if term.function is not None
        ]
        self._call = FunctionCaller()
        self.classifiers = [
            Classifier(each, device, setting) for setting, each in config.classifiers
        ]

    @property
    def classifier(self) -> Classifier:
        """The classifier of `reward.model`."""
        return self.classifiers[0]

    def __call__(self, request: ScoreRequest) -> Scores:
        """Score a batch.

        Raises:
            ValueError: a classifier's output is not finite, or a function did not return one finite
                number per response.
        """
        tokenized = self.tokenize(request)
        return self.combine(self.forward(tokenized.rows), tokenized.truncated, request)

    def tokenize(self, request: ScoreRequest) -> Tokenized:
        """Tokenize a batch for every classifier."""
        rows, truncated = [], np.zeros(len(request), dtype=bool)
        for classifier in self.classifiers:
            prompts = request.prompts if classifier.config.input == "prompt+response" else None
            tokens, too_long = classifier.tokenize(request.responses, prompts)
            rows.append(tokens)
            truncated |= too_long
        return Tokenized(rows, truncated)

    def forward(
        self, rows: Sequence[Sequence[TokenizedText]], batch_tokens: int | None = None
    ) -> Outputs:
        """Run every classifier on its texts; see `Classifier.forward`."""
        return [
            classifier.forward(own, batch_tokens)
            for classifier, own in zip(self.classifiers, rows, strict=True)
        ]

    def check_finite(self, outputs: Outputs) -> None:
        """Check that scores and toxicities are numbers, because NaN compares as neither high nor low.

        Raises:
            ValueError: a classifier gave NaN or an infinite value.
        """
        for (setting, config), values in zip(self.config.classifiers, outputs, strict=True):
            finite = np.isfinite(np.stack(values)).all(axis=0)
            if not finite.all():
                raise ValueError(
                    f"The classifier {config.model} ({setting}.model) gave NaN or an infinite value "
                    f"for {int((~finite).sum())} of {finite.size} texts; expected finite logits. "
                    f"Check its weights, or set {setting}.model to another classifier."
                )

    def combine(self, outputs: Outputs, truncated: np.ndarray, request: ScoreRequest) -> Scores:
        """Call the functions, and add up all parts of the reward.

            rewards = weight * score + sum over terms of weight * value

        A term's value is the score of its classifier, or what its function returns.

        Args:
            outputs: from `forward`.
            truncated: [B] bool, from `tokenize`.
            request: the batch that they belong to.

        Raises:
            ValueError: a classifier's output is not finite, or a function did not return one finite
                number per response.
        """
        self.check_finite(outputs)
        (score, toxicity), *others = outputs
        of_classifiers = iter([value for value, _ in others])
        of_functions = iter(self._call(self._functions, request))
        rewards = np.float32(self.config.weight) * score
        values: dict[str, np.ndarray] = {}
        for term in self.config.terms:
            value = next(of_functions if term.function is not None else of_classifiers)
            values[term.name] = value
            rewards += np.float32(term.weight) * value
        return Scores(rewards, score, toxicity, truncated, values)

    def submit(self, request: ScoreRequest) -> Pending:
        """Score at once: no other process does the work."""
        return Ready(self(request))
