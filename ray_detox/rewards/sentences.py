"""A trial of the reward on plain sentences: it must not prefer an insult to a thank-you.

A label that means the opposite, a head that is read the wrong way, or a weight of the wrong sign
trains a policy to insult, and the report then says that toxicity fell. Nothing later in a run can
tell, so the reward is tried on sentences whose order is beyond doubt, before anything is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_detox.config import ClassifierConfig, ConfigError, RewardConfig
from ray_detox.records import ScoreRequest, Scores
from ray_detox.rewards.functions import failure_of
from ray_detox.rewards.reward import Reward

KIND = (
    "Thank you, that was very kind of you.",
    "You are a great person and i like you.",
)
INSULTING = (
    "You are a stupid fool, so shut up.",
    "You are a terrible person and i hate you.",
)
"""The second of each comes from the published method. Both lists have the same number of words and
of characters, so that a function that only looks at length prefers neither."""
DECIMALS = 4
"""Differences below rounding do not count."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A prompt and the other columns of its row, for functions that read them."""

    prompt: str
    columns: Mapping[str, Any]


def check_sentences(reward: Reward, row: SampleRow) -> None:
    """Score the sentences as responses to a prompt, and refuse a reward that prefers the insults.

    Classifiers score the sentences without the prompt, even with `input=prompt+response`: a prompt
    that is toxic itself would hide the difference.

    Args:
        reward: to try. No other thread may use it meanwhile.
        row: of the data.

    Raises:
        ConfigError: the reward or the reported toxicity has the wrong order, a classifier's output
            is not finite, or a function failed.
    """
    texts = [*KIND, *INSULTING]
    classifier = reward.classifier
    rows = [each.tokenize(texts) for each in reward.classifiers]
    request = ScoreRequest(
        prompts=[row.prompt] * len(texts),
        responses=texts,
        # The policy's tokenizer is not at hand; these serve functions that count or compare tokens.
        response_ids=[tokens.inputs["input_ids"] for tokens in classifier.tokenize(texts)[0]],
        columns={name: [value] * len(texts) for name, value in row.columns.items()},
    )
    outputs = reward.forward([tokens for tokens, _ in rows])
    try:
        reward.check_finite(outputs)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        scores = reward.combine(outputs, rows[0][1], request)
    except Exception as error:  # whatever a person's function raises
        failure = failure_of(error)
        name = failure.term if failure else "a function"
        where = f", {failure.where}" if failure and failure.where else ""
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"reward.terms: {name} failed on {len(texts)} sample responses "
            f"({type(error).__name__}: {reason}{where}). Functions get prompts and completions as lists of "
            "texts (not of messages), completion_ids, and the columns of the data."
        ) from error
    refuse_wrong_order(scores, reward.config)


def refuse_wrong_order(scores: Scores, config: RewardConfig) -> None:
    """Refuse scores that do not rank `KIND` before `INSULTING`.

    Args:
        scores: of the sentences of `KIND`, then of those of `INSULTING`.
        config: for the remedy.

    Raises:
        ConfigError: toxicity is not higher for the insults, or the reward is.
    """
    # The mean over several sentences: one of them may be outside of what a classifier knows.
    toxicity, rewards = _means(scores.toxicity), _means(scores.rewards)
    if not toxicity[1] > toxicity[0]:  # also for NaN
        raise ConfigError(
            f"The toxicity that {config.model} measures is {toxicity[1]:.3f} for insults such as "
            f"{INSULTING[0]!r} and {toxicity[0]:.3f} for {KIND[0]!r}. {_other_label(config)} "
            "(reward.check_sentences=false runs it as it is.)"
        )
    if rewards[1] > rewards[0]:
        raise ConfigError(
            f"The reward prefers insults: {rewards[1]:.2f} for sentences such as {INSULTING[0]!r}, "
            f"{rewards[0]:.2f} for {KIND[0]!r}. {_weights(config)} "
            "(reward.check_sentences=false runs it as it is.)"
        )


def _means(values: np.ndarray) -> tuple[float, float]:
    """Return the means over the kind and the insulting sentences, rounded."""
    kind, insulting = values[: len(KIND)], values[len(KIND) :]
    return round(float(kind.mean()), DECIMALS), round(float(insulting.mean()), DECIMALS)


def _other_label(config: ClassifierConfig) -> str:
    if config.toxic_label is not None:
        return (
            f"If {config.toxic_label!r} means not toxic, set reward.label={config.toxic_label} "
            "reward.toxic_label=null; otherwise set another label or another reward.model."
        )
    return (
        f"If {config.label!r} means toxic, set reward.toxic_label={config.label} reward.label=null; "
        "otherwise set another label or another reward.model."
    )


def _weights(config: RewardConfig) -> str:
    terms = "".join(f", {term.name} {term.weight:g}" for term in config.terms)
    return (
        f"Check the signs of the weights (reward.weight {config.weight:g}{terms}) and the labels of "
        "classifiers in reward.terms."
    )
