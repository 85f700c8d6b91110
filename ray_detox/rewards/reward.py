"""The reward: a hate-speech classifier, and any further functions in TRL's protocol.

The score of a text is the raw logit of one label ("nothate"), and the reward looks that label up
by its name. A fixed index that was right for another model, or a pipeline that sorts labels by
score, would reward the wrong label without an error. This module knows no policy and no Ray.
"""

import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ray_detox.config import ConfigError, RewardConfig, RewardTerm
from ray_detox.models.classifier import Classifier
from ray_detox.records import Pending, ScoreRequest, Scores

RewardFunction = Callable[..., Sequence[float | None]]
"""TRL's protocol: keywords `prompts`, `completions`, `completion_ids` and the data's columns, each
[B]; returns one number per completion, or None if it does not apply to that sample."""


class Ready:
    """Scores that are complete: the `Pending` of a scorer in this process."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def result(self) -> Scores:
        """Return the scores."""
        return self._scores


def load_reward_function(term: RewardTerm) -> RewardFunction:
    """Import the function that a term names; call it with the term's arguments if it has any.

    Raises:
        ConfigError: nothing is at that import path, or the result is not callable.
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
        raise ConfigError(f"reward.terms: {term.function} is not a function.")
    return found


class Reward:
    """The classifier and the extra terms together; itself a `Scorer` within one process."""

    def __init__(self, config: RewardConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.terms = [(term, load_reward_function(term)) for term in config.terms]
        self.classifier = Classifier(config, device)

    def __call__(self, request: ScoreRequest) -> Scores:
        """Score a batch.

        Raises:
            ValueError: an extra term did not return one finite number per response.
        """
        logits, toxicity, truncated = self.classifier(request.classifier_inputs(self.config.input))
        return self.add_terms(logits, toxicity, truncated, request)

    def add_terms(
        self,
        logits: np.ndarray,
        toxicity: np.ndarray,
        truncated: np.ndarray,
        request: ScoreRequest,
    ) -> Scores:
        """Add the extra terms to the classifier's output.

            rewards = logits + sum over terms of weight * value

        Args:
            logits: [B] float32, from the classifier.
            toxicity: [B] float32, from the classifier.
            truncated: [B] bool, from the classifier.
            request: the batch that they belong to.

        Raises:
            ValueError: an extra term did not return one finite number per response.
        """
        rewards = logits.copy()
        values: dict[str, np.ndarray] = {}
        for term, function in self.terms:
            # All keywords of TRL's trainers; a function names those it needs and ignores the rest.
            output = function(
                prompts=list(request.prompts),
                completions=list(request.responses),
                completion_ids=[list(row) for row in request.response_ids],
                **request.columns,
            )
            # None means "not applicable to this sample" in that protocol, and adds nothing.
            value = np.array([0.0 if v is None else v for v in output], dtype=np.float32)
            if value.shape != logits.shape or not np.isfinite(value).all():
                raise ValueError(
                    f"The reward term {term.name} returned {value.shape[0]} values for "
                    f"{len(request)} responses, or a value that is not a finite number; expected "
                    "one finite number per response."
                )
            values[term.name] = value
            rewards += np.float32(term.weight) * value
        return Scores(rewards, logits, toxicity, truncated, values)

    def submit(self, request: ScoreRequest) -> Pending:
        """Score at once: no other process does the work."""
        return Ready(self(request))
