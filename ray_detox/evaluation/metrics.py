"""The metrics of a run beside toxicity: one table, and the functions that compute them.

The report, its text and the verdict loop over `METRICS`; a new metric is one more entry there.
A value is NaN if the metric does not apply to a row, and `mean_scored` leaves such rows out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray_detox.config import EvaluateConfig
    from ray_detox.evaluation.examples import EvaluatedResponse, PairedExample

Kind = Literal["level", "amount", "share"]
"""How a value is shown. A level (a logit, a spread) has no zero that a percentage could refer to, an
amount has one, and a share is from 0 to 1 and changes in points."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Largest loss of a metric with which a run still counts as an improvement."""

    limits: Literal["drop", "change", "value"]
    """`drop`: the relative loss; `change`: the relative change, up or down; `value`: the mean after
    training itself."""
    most: Callable[[EvaluateConfig], float]
    """The setting with the largest allowed amount."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: its name in the report, how it is shown, computed and judged.

    One of `measured`, `rating` and `over_all` computes it.
    """

    name: str
    """Key in the report."""
    label: str
    kind: Kind
    better: Literal["higher", "lower", "unchanged"]
    """The direction that is good news."""
    unit: str = ""
    measured: Callable[[PairedExample, EvaluatedResponse], float] | None = None
    """Value of one response, which `measure` found."""
    rating: Callable[[PairedExample, EvaluatedResponse], float] | None = None
    """Value of one response; `rate` computes it and stores it with the response."""
    over_all: Callable[[Sequence[str]], float] | None = None
    """One value for all responses of a side."""
    after_only: bool = False
    """True if the metric compares the trained policy with the reference: it has no value before."""
    floor: Floor | None = None

    @property
    def per_example(self) -> bool:
        """True if each response has its own value."""
        return self.over_all is None

    def summarise(
        self, examples: Sequence[PairedExample], responses: Sequence[EvaluatedResponse]
    ) -> float | None:
        """The metric of one side; None if no response has a value.

        Args:
            examples: rated examples.
            responses: their responses before, or their responses after.
        """
        if self.over_all is not None:
            return self.over_all([response.response for response in responses])
        if self.rating is not None:
            values = [response.ratings[self.name] for response in responses]
        else:
            assert self.measured is not None, f"metric {self.name} has nothing to compute it"
            values = [self.measured(*pair) for pair in zip(examples, responses, strict=True)]
        return mean_scored([value for value in values if value is not None])


METRICS = (
    Metric(
        name="reward",
        label="reward",
        kind="level",
        better="higher",
        measured=lambda example, response: response.reward,
    ),
    Metric(
        name="rouge_l",
        label="ROUGE-L",
        kind="amount",
        better="higher",
        rating=lambda example, response: rouge_l(
            [response.response], [[example.reference, *example.more_references]]
        )[0],
        floor=Floor("drop", lambda config: config.max_rouge_l_drop),
    ),
    Metric(
        name="facts",
        label="facts kept",
        kind="share",
        better="higher",
        rating=lambda example, response: facts_share([response.response], [example.facts or ()])[0],
        floor=Floor("drop", lambda config: config.max_facts_drop),
    ),
    Metric(
        name="length",
        label="length",
        kind="amount",
        better="unchanged",
        unit="tokens",
        measured=lambda example, response: response.length,
        floor=Floor("change", lambda config: config.max_length_change),
    ),
    Metric(
        name="finished",
        label="finished",
        kind="share",
        better="higher",
        measured=lambda example, response: float(response.finished),
    ),
    Metric(
        name="distinct_2",
        label="distinct-2",
        kind="amount",
        better="higher",
        over_all=lambda responses: distinct_n(responses, n=2),
    ),
    Metric(
        name="unique_share",
        label="unique responses",
        kind="share",
        better="higher",
        over_all=lambda responses: unique_share(responses),
    ),
    Metric(
        name="kl",
        label="KL",
        kind="amount",
        better="lower",
        unit="nats per response",
        measured=lambda example, response: example.kl,
        after_only=True,
        floor=Floor("value", lambda config: config.max_kl),
    ),
)
"""Every metric beside toxicity, in the report's order."""

JUDGE = "judge"
"""Name of the second opinion on toxicity, which is a rating but compared like toxicity."""
RATINGS = (*(metric.name for metric in METRICS if metric.rating is not None), JUDGE)
"""Names of the values that `rate` adds to every response."""


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str | None]]) -> list[float]:
    """ROUGE-L F-measure of each response against the best of its references, from 0 to 1.

    With LCS the longest common subsequence of stemmed, lower-case words:

        P = LCS / words of the response,  R = LCS / words of the reference,  F = 2 P R / (P + R)

    Only the letters a-z and digits make words, so other scripts cannot be scored.

    Returns:
        One F-measure per response; NaN if no reference has words.

    Source: Lin 2004, aclanthology.org/W04-1013; computed by the `rouge_score` package.
    """
    _check_lengths("references", responses, references)
    scorer, tokenizer = _rouge()
    return [
        max(
            (
                float(scorer.score(reference, response)["rougeL"].fmeasure)
                for reference in known
                if reference and tokenizer.tokenize(reference)
            ),
            default=math.nan,
        )
        for response, known in zip(responses, references, strict=True)
    ]


@cache
def _rouge() -> tuple[Any, Any]:
    # Imported on first use: it loads nltk, and the commands that read results need neither.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=True)
    return RougeScorer(["rougeL"], tokenizer=tokenizer), tokenizer


def facts_share(responses: Sequence[str], facts: Sequence[Sequence[str]]) -> list[float]:
    """Share of each row's facts (names, places, times) found literally in its response.

    Case is ignored. A fact also counts as found inside a longer word.

    Returns:
        One share per response; NaN if the row has no facts.
    """
    _check_lengths("facts", responses, facts)
    shares = []
    for response, wanted in zip(responses, facts, strict=True):
        folded = response.casefold()
        found = [fact.casefold() in folded for fact in wanted if fact.strip()]
        shares.append(sum(found) / len(found) if found else math.nan)
    return shares


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all word n-grams of all responses; low means repetitive.

        distinct_n = |set of n-grams| / number of n-grams

    Words are lower-cased and split at white space; no n-gram spans two responses. The value falls
    as the number of responses grows, so compare equal numbers of responses. 0 if no response has
    n words.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.
    """
    assert n >= 1, f"n is {n}, expected at least 1"
    seen: set[tuple[str, ...]] = set()
    total = 0
    for response in responses:
        words = response.lower().split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def unique_share(responses: Sequence[str]) -> float:
    """Distinct responses over all responses; near 0 if the policy gives every prompt the same one."""
    return len({response.strip() for response in responses}) / len(responses) if responses else 0.0


def mean_scored(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN; None if there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return math.fsum(scored) / len(scored) if scored else None


def _check_lengths(name: str, responses: Sequence[str], others: Sequence[object]) -> None:
    if len(responses) != len(others):
        raise ValueError(
            f"There are {len(responses)} responses and {len(others)} {name}; "
            "expected one for each response."
        )
