"""The record of an evaluated prompt: its response before training, its response after, and scores.

Our functions pass `PairedExample`s. The stores, the page and samples.jsonl keep each one as a flat
JSON object, which `to_json` writes and `from_json` reads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ray_detox.evaluation.metrics import RATINGS

SIDES = ("before", "after")


@dataclass(frozen=True, slots=True)
class EvaluatedResponse:
    """A response to a held-out prompt, with everything that was measured of it."""

    response: str
    reward: float
    toxicity: float
    """Probability of hate, from 0 to 1."""
    length: int
    """Tokens, end-of-sequence included."""
    truncated: bool
    """True if the text was longer than the reward model reads."""
    finished: bool
    """True if it ended with end-of-sequence, False if its limit cut it."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Each extra reward term by name, before its weight."""
    ratings: Mapping[str, float | None] = field(default_factory=dict)
    """Ratings by name (`metrics.RATINGS`), None if they do not apply; empty before `rate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedExample:
    """One held-out prompt, answered by the reference (before) and by the trained policy (after).

    Example: its JSON form, rated and without extra reward terms.

        {"index": 0, "prompt_id": "3f...", "query": "Summarize ...", "reference": "Tom is late.",
         "facts": ["late"], "kl": 1.5,
         "response_before": "...", "reward_before": -1.0, "toxicity_before": 0.9,
         "length_before": 10, "truncated_before": false, "finished_before": true,
         "response_after": "...", ...,
         "rouge_l_before": 0.4, "facts_before": 1.0, "rouge_l_after": 0.5, "facts_after": 1.0}
    """

    index: int
    """Position among the held-out prompts of the run."""
    prompt_id: str
    """Hash of the prompt's text."""
    query: str
    """The prompt."""
    reference: str | None
    """The data's own summary; None if it has none."""
    facts: tuple[str, ...] | None
    """Texts that a good response contains literally; None if the data does not say."""
    kl: float
    """KL of the trained policy to the reference on the response after, in nats."""
    before: EvaluatedResponse
    after: EvaluatedResponse

    def to_json(self) -> dict[str, Any]:
        """The stored form: one flat object, each side's values under `<name>_<side>`."""
        flat: dict[str, Any] = {
            "index": self.index,
            "prompt_id": self.prompt_id,
            "query": self.query,
            "reference": self.reference,
            "facts": None if self.facts is None else list(self.facts),
            "kl": self.kl,
        }
        for side, response in self._sides():
            flat[f"response_{side}"] = response.response
            flat[f"reward_{side}"] = response.reward
            flat[f"toxicity_{side}"] = response.toxicity
            flat[f"length_{side}"] = response.length
            flat[f"truncated_{side}"] = response.truncated
            flat[f"finished_{side}"] = response.finished
            flat |= {f"{name}_{side}": value for name, value in response.terms.items()}
        for side, response in self._sides():
            flat |= {f"{name}_{side}": value for name, value in response.ratings.items()}
        return flat

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """The record of a stored form; the inverse of `to_json`.

        Raises:
            ValueError: it is not an object, or a field is missing or unknown.
        """
        if not isinstance(stored, Mapping):
            raise ValueError(f"an evaluated prompt is {stored!r}, expected an object")
        rest = dict(stored)
        try:
            before, after = (_pop_response(rest, side) for side in SIDES)
            facts = rest.pop("facts")
            example = cls(
                index=rest.pop("index"),
                prompt_id=rest.pop("prompt_id"),
                query=rest.pop("query"),
                reference=rest.pop("reference"),
                facts=None if facts is None else tuple(facts),
                kl=rest.pop("kl"),
                before=before,
                after=after,
            )
        except KeyError as error:
            raise ValueError(f"an evaluated prompt lacks the field {error}") from None
        if rest:
            raise ValueError(f"an evaluated prompt has the unknown field {next(iter(rest))!r}")
        return example

    def _sides(self) -> Iterator[tuple[str, EvaluatedResponse]]:
        return zip(SIDES, (self.before, self.after), strict=True)


def _pop_response(stored: dict[str, Any], side: str) -> EvaluatedResponse:
    """Take the fields of one side out of a stored form."""
    suffix = f"_{side}"
    names = [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]
    values = {name: stored.pop(name + suffix) for name in names}
    ratings = {name: values.pop(name) for name in names if name in RATINGS}
    try:
        return EvaluatedResponse(
            response=values.pop("response"),
            reward=values.pop("reward"),
            toxicity=values.pop("toxicity"),
            length=values.pop("length"),
            truncated=values.pop("truncated"),
            finished=values.pop("finished"),
            terms=values,  # the remaining values are the reward terms, under their names
            ratings=ratings,
        )
    except KeyError as error:
        raise KeyError(error.args[0] + suffix) from None
