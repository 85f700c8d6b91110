"""What a summary is worth beside not being toxic: overlap, facts, variety.

Plain functions of texts; one number per response, or one for all. NaN means "cannot be said
of this row", and `mean_scored` leaves such rows out.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any


def rouge_l(responses: Sequence[str], references: Sequence[str | None]) -> list[float]:
    """ROUGE-L F-measure of each response against its reference, from 0 to 1.

    With LCS the longest common subsequence of stemmed, lower-case words:

        P = LCS / words of the response,  R = LCS / words of the reference,  F = 2 P R / (P + R)

    Only the letters a-z and digits make words, so other scripts cannot be scored.

    Returns:
        One F-measure per response; NaN where the reference has no words.

    Source: Lin 2004, aclanthology.org/W04-1013; computed by the `rouge_score` package.
    """
    _check_lengths("references", responses, references)
    scorer, tokenizer = _rouge()
    return [
        float(scorer.score(reference, response)["rougeL"].fmeasure)
        if reference and tokenizer.tokenize(reference)
        else math.nan
        for response, reference in zip(responses, references, strict=True)
    ]


@cache
def _rouge() -> tuple[Any, Any]:
    # Imported on first use: it brings nltk, and readers of results need neither.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=True)
    return RougeScorer(["rougeL"], tokenizer=tokenizer), tokenizer


def facts_share(responses: Sequence[str], facts: Sequence[Sequence[str]]) -> list[float]:
    """Share of each row's facts (names, places, times) found literally in its response.

    Upper and lower case count as the same. A fact is found inside a longer word, too.

    Returns:
        One share per response; NaN where the row has no facts.
    """
    _check_lengths("facts", responses, facts)
    shares = []
    for response, wanted in zip(responses, facts, strict=True):
        folded = response.casefold()
        found = [fact.casefold() in folded for fact in wanted if fact.strip()]
        shares.append(sum(found) / len(found) if found else math.nan)
    return shares


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of all responses; low means repetitive.

        distinct_n = |set of n-grams| / number of n-grams

    Words are lower-cased and split at white space; no n-gram crosses from one response to the
    next. It falls as more text is compared, so compare equal numbers of responses. 0 where no
    response has n words.

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
    """Different responses over all responses; near 0 where the policy says the same to everyone."""
    return len({response.strip() for response in responses}) / len(responses) if responses else 0.0


def mean_scored(values: Sequence[float]) -> float | None:
    """Mean of the values that are not NaN; None where there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return math.fsum(scored) / len(scored) if scored else None


def _check_lengths(name: str, responses: Sequence[str], others: Sequence[object]) -> None:
    if len(responses) != len(others):
        raise ValueError(
            f"There are {len(responses)} responses and {len(others)} {name}; "
            "expected one for each response."
        )
