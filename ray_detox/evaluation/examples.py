"""The record of an evaluated prompt: its response before training, its response after, and scores.

Our functions pass `PairedExample`s. The stores, the page and samples.jsonl keep each one as a flat
JSON object, which `to_json` writes and `from_json` reads.
"""

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ray_detox.evaluation.metrics import RATINGS

SIDES = ("before", "after")

_NUMBER = (float, int)
_KINDS: dict[str, tuple[type, ...]] = {
    "index": (int,),
    "prompt_id": (str,),
    "query": (str,),
    "reference": (str, type(None)),
    "more_references": (list,),
    "facts": (list, type(None)),
    "kl": _NUMBER,
    "response": (str,),
    "reward": _NUMBER,
    "toxicity": _NUMBER,
    "length": (int,),
    "truncated": (bool,),
    "finished": (bool,),
}
"""Types of the stored fields, those of a side without the side."""


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
    more_references: tuple[str, ...] = ()
    """Further summaries, where the data repeat the prompt; not in the JSON form if there are none."""
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
        if self.more_references:
            flat["more_references"] = list(self.more_references)
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
            ValueError: it is not an object, or a field is missing, unknown or of another type.
        """
        if not isinstance(stored, Mapping):
            raise ValueError(f"an evaluated prompt is {reprlib.repr(stored)}, expected an object")
        rest = dict(stored)
        try:
            before, after = (_pop_response(rest, side) for side in SIDES)
            facts = _pop(rest, "facts")
            more = _pop(rest, "more_references") if "more_references" in rest else []
            for name, texts in (("facts", facts or ()), ("more_references", more)):
                for text in texts:
                    _check(name, text, (str,))
            example = cls(
                index=_pop(rest, "index"),
                prompt_id=_pop(rest, "prompt_id"),
                query=_pop(rest, "query"),
                reference=_pop(rest, "reference"),
                more_references=tuple(more),
                facts=None if facts is None else tuple(facts),
                kl=_pop(rest, "kl"),
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
    names = ("response", "reward", "toxicity", "length", "truncated", "finished")
    fields = {name: _pop(stored, name, suffix) for name in names}
    # The remaining values are the ratings and the reward terms, under their names.
    terms, ratings = dict[str, Any](), dict[str, Any]()
    for full_name in [name for name in stored if name.endswith(suffix)]:
        name, value = full_name.removesuffix(suffix), stored.pop(full_name)
        is_rating = name in RATINGS
        _check(full_name, value, (*_NUMBER, type(None)) if is_rating else _NUMBER)
        (ratings if is_rating else terms)[name] = value
    return EvaluatedResponse(**fields, terms=terms, ratings=ratings)


def _pop(stored: dict[str, Any], name: str, suffix: str = "") -> Any:
    """Take a field out of a stored form, and check its type."""
    value = stored.pop(name + suffix)
    _check(name + suffix, value, _KINDS[name])
    return value


def _check(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds:  # isinstance would take true for a number
        raise ValueError(
            f"the field {name!r} of an evaluated prompt is {reprlib.repr(value)}, expected "
            f"{' or '.join(kind.__name__ for kind in kinds)}"
        )
