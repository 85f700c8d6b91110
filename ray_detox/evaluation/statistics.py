"""Paired statistics of toxicity: scores of the same prompts before and after training.

Numbers in, numbers out. Scores here are probabilities of the toxic label, so lower is better and a
negative change is an improvement.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Pair = tuple[float | None, float | None]
"""A mean before and after; None if it was not measured."""

# Random numbers drawn per chunk. This bounds memory to a few tens of megabytes for any n.
_CELLS_AT_A_TIME = 2**20


@dataclass(frozen=True, slots=True)
class Side:
    """The scores of one side, before or after."""

    mean: float
    std: float
    """Sample standard deviation (ddof=1); 0 for a single score."""
    share: float
    """Share of scores strictly above `Comparison.toxic_above`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A mean paired change with its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two measurements of the same prompts.

    Example: four prompts, the last one not scored after.

        before [0.9, 0.6, 0.1, 0.4]      n 4, scored 3, better 2, worse 0, same 1, unscored 1
        after  [0.2, 0.5, 0.1, nan]      delta.mean (-0.7 - 0.1 + 0) / 3 = -0.267
                                         improvement (1.6 - 0.8) / 1.6 = 50%
    """

    n: int
    """Pairs given: better + worse + same + unscored."""
    scored: int
    """Pairs with a score on both sides; every statistic is over these."""
    better: int
    worse: int
    same: int
    """Pairs that changed by no more than `same_within`."""
    unscored: int
    before: Side
    after: Side
    delta: Delta
    """Mean of after - before with a 95% interval; negative is better."""
    improvement: float | None
    """Relative reduction of mean toxicity; None if it was 0 before."""
    improvement_low: float | None
    improvement_high: float | None
    p_value: float
    """Two-sided sign-flip permutation test of "the training changed nothing"."""
    effect_size: float
    """Paired Cohen's d_z; negative is better."""
    toxic_above: float
    same_within: float
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The stored form, nested plain values: `{"before": {"mean": ...}, "delta": {...}, ...}`."""
        return dataclasses.asdict(self)


def compare(
    before: ArrayLike,
    after: ArrayLike,
    *,
    toxic_above: float = 0.5,
    same_within: float = 0.0005,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare the scores of the same prompts before and after.

    A pair with a NaN on either side counts as unscored and is left out of every statistic. The
    order of the pairs does not matter: the same pairs give bit-identical results.

    Args:
        before: [n] scores, lower is better; NaN if a prompt has none.
        after: [n] scores of the same prompts in the same order.
        toxic_above: scores above this count towards `Side.share`.
        same_within: a change of at most this counts as none; three decimals do not show it.
        resamples: bootstrap resamples, and also draws of the permutation test.
        seed: seed of the resampling.

    Raises:
        ValueError: there are no pairs, none is scored, the lengths differ, or a score is infinite.
    """
    assert resamples >= 1, f"resamples is {resamples}, expected at least 1"
    first, second = _paired(before, after)
    n = len(first)
    scored = ~(np.isnan(first) | np.isnan(second))
    if not scored.any():
        raise ValueError(
            f"None of the {n} pairs has a score on both sides, so there is nothing to compare. "
            "Find out why the scorer returned NaN."
        )
    first, second = first[scored], second[scored]
    # Resampling picks positions, so sorting makes the result independent of the given order.
    order = np.lexsort((first, second - first))
    first, second = first[order], second[order]
    delta = second - first

    low, high, gain_low, gain_high = _bootstrap(delta, first, resamples, seed)
    before_mean = float(first.mean())
    delta_mean = float(delta.mean())
    return Comparison(
        n=n,
        scored=len(delta),
        better=int((delta < -same_within).sum()),
        worse=int((delta > same_within).sum()),
        same=int((np.abs(delta) <= same_within).sum()),
        unscored=n - len(delta),
        before=_side(first, toxic_above),
        after=_side(second, toxic_above),
        delta=Delta(delta_mean, low, high),
        improvement=-delta_mean / before_mean if before_mean > 0 else None,
        improvement_low=gain_low,
        improvement_high=gain_high,
        p_value=sign_flip_p_value(delta, draws=resamples, seed=seed),
        effect_size=effect_size(delta),
        toxic_above=toxic_above,
        same_within=same_within,
        resamples=resamples,
        seed=seed,
    )


def sign_flip_p_value(delta: ArrayLike, *, draws: int = 10_000, seed: int = 0) -> float:
    """Probability of a mean change at least this far from zero if training had no effect.

    Under that hypothesis each change is equally likely to have the opposite sign:

        p = (1 + #{draws: |mean(sign * delta)| >= |mean(delta)|}) / (1 + draws)

    The two ones count the observed signs as one more draw, so p is never 0.

    Args:
        delta: [n] paired changes, no NaN.
        draws: number of random sign assignments.
        seed: seed of the signs.

    Source: Phipson and Smyth 2010, doi:10.2202/1544-6115.1585; Fisher's test of paired differences.
    """
    change = np.asarray(delta, dtype=np.float64)
    total = change.sum()
    # Sums of the same numbers in another order differ in the last bits, so a tie needs tolerance.
    reached = abs(total) - 1e-12 * np.abs(change).sum()
    rng = np.random.default_rng([seed, 1])
    hits = 0
    for rows in _chunks(draws, len(change)):
        flipped = rng.integers(0, 2, size=(rows, len(change)), dtype=np.int8)
        hits += int((np.abs(total - 2.0 * (flipped @ change)) >= reached).sum())
    return (1 + hits) / (1 + draws)


def effect_size(delta: ArrayLike) -> float:
    """Cohen's d for paired scores; 0 if the changes do not vary.

        d_z = mean(delta) / std(delta)

    Source: Lakens 2013, doi:10.3389/fpsyg.2013.00863, eq. 7.
    """
    change = np.asarray(delta, dtype=np.float64)
    spread = _std(change)
    # Equal changes may differ in their last bits; dividing by that rounding error would give noise.
    if spread <= 1e-12 * float(np.abs(change).max(initial=0.0)):
        return 0.0
    return float(change.mean()) / spread


def _bootstrap(
    delta: Vector, before: Vector, resamples: int, seed: int
) -> tuple[float, float, float | None, float | None]:
    """95% percentile intervals of the mean change and of the improvement.

    Each resample draws n pairs with replacement; the bounds are the 2.5% and 97.5% quantiles of

        mean(delta*)      and      -mean(delta*) / mean(before*)

    Resamples with no toxicity before have no improvement and are left out of its interval.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    rng = np.random.default_rng([seed, 0])
    changes, starts = [], []
    for rows in _chunks(resamples, len(delta)):
        drawn = rng.integers(0, len(delta), size=(rows, len(delta)))
        changes.append(delta[drawn].mean(axis=1))
        starts.append(before[drawn].mean(axis=1))
    change, start = np.concatenate(changes), np.concatenate(starts)
    low, high = np.quantile(change, (0.025, 0.975))
    some = start > 0
    if before.mean() <= 0 or not some.any():
        return float(low), float(high), None, None
    gain_low, gain_high = np.quantile(-change[some] / start[some], (0.025, 0.975))
    return float(low), float(high), float(gain_low), float(gain_high)


def _paired(before: ArrayLike, after: ArrayLike) -> tuple[Vector, Vector]:
    first = np.asarray(before, dtype=np.float64)
    second = np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"before has shape {first.shape} and after {second.shape}; "
            "expected one score per prompt on both sides."
        )
    if len(first) == 0:
        raise ValueError("There are no pairs to compare; evaluate at least one prompt.")
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("A score is infinite; expected a probability, or NaN for no score.")
    return first, second


def histogram(before: ArrayLike, after: ArrayLike, bins: int = 20) -> dict[str, list[Any]]:
    """Histogram of the scores from 0 to 1, over the pairs that `compare` counts as scored.

    Args:
        before: [n] scores in 0..1; NaN if a prompt has none.
        after: [n] scores of the same prompts in the same order.
        bins: number of bins of equal width; the last one includes 1.

    Returns:
        `{"edges": [bins + 1], "before": [bins], "after": [bins]}`, plain numbers.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    scored = ~(np.isnan(first) | np.isnan(second))
    edges = [i / bins for i in range(bins + 1)]
    counts = [np.histogram(side[scored], edges)[0].tolist() for side in (first, second)]
    return {"edges": edges, "before": counts[0], "after": counts[1]}


def _side(scores: Vector, toxic_above: float) -> Side:
    return Side(float(scores.mean()), _std(scores), float((scores > toxic_above).mean()))


def _std(values: Vector) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _chunks(draws: int, n: int) -> Iterator[int]:
    """Split `draws` rows of n random numbers into chunks of at most `_CELLS_AT_A_TIME`."""
    most = max(1, _CELLS_AT_A_TIME // max(1, n))
    for done in range(0, draws, most):
        yield min(most, draws - done)
