"""The settings of a run, validated when the run is described.

A run is a recipe (a YAML file) plus overrides such as `ppo.kl_coef=0.1`; `recipes/loading.py`
reads both. The sections below hold every setting with its range and its description. A value that
is wrong by itself, or contradicts another, raises `ConfigError` here; what needs a look at files,
models or the cluster is checked by `stages/preflight.py`.

    data, policy, sampling, reward, ppo, train, evaluate    what a researcher sets
    serving, cluster, results                               what the operator of a cluster sets
"""

import difflib
import re
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticKnownError

from ray_detox.addresses import credentials_in, has_credentials
from ray_detox.errors import ConfigError as ConfigError  # also imported from here

# ---- types of settings -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remedy:
    """The fix that the message about an empty value suggests."""

    text: str


def _parse_number(value: object) -> object:
    # YAML 1.1 reads `1e-3` as text, because it has no dot.
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _parse_list(value: object) -> object:
    # YAML and JSON have lists. A set has no order, so it stays what it is and is refused.
    return tuple(value) if isinstance(value, list) else value


def _check_json(value: object) -> object:
    """Refuse values that a stored config.json would change, such as dates, sets and number keys."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for item in value.values():
            _check_json(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(item)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(
            "JSON values: text, numbers, true, false, null, lists, and names with values"
        )
    return value


def _check_count(value: object) -> object:
    count_range(value)
    return value


def count_range(value: object) -> tuple[int, int]:
    """Return the smallest and the largest count of a setting such as `2` or `1..4`.

    Raises:
        ValueError: the value is neither.
    """
    low, dots, high = str(value).partition("..")
    ends = (low, high if dots else low)
    if all(end.isascii() and end.isdecimal() for end in ends):
        smallest, largest = (int(end) for end in ends)
        if 1 <= smallest <= largest:
            return smallest, largest
    raise ValueError("a whole number of at least 1, or a range such as 1..4")


def _check_unicode(value: str) -> str:
    # pydantic itself checks this only for texts without a minimum length.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise PydanticCustomError("string_unicode", "is not Unicode")
    return value


def _check_address(value: str) -> str:
    if has_credentials(value):
        raise PydanticCustomError("credentials", "has credentials")
    return value


def _check_host(value: str) -> str:
    if has_credentials(value, is_host=True):
        raise PydanticCustomError("credentials", "has credentials")
    return value


_PARSE = BeforeValidator(_parse_number)
_LIST = BeforeValidator(_parse_list)
Number = Annotated[float, _PARSE]
"""A finite number."""
Positive = Annotated[float, Field(gt=0), _PARSE]
NonNegative = Annotated[float, Field(ge=0), _PARSE]
Share = Annotated[float, Field(ge=0, le=1), _PARSE]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_check_unicode)]
Address = Annotated[str, AfterValidator(_check_unicode), AfterValidator(_check_address)]
"""A folder, a hub id or a URL, without credentials: settings are stored and shown."""
Host = Annotated[str, AfterValidator(_check_host)]
"""A URL or `host:port`, without credentials."""
AtLeastOne = Annotated[int, Field(ge=1)]
CountOrRange = Annotated[int | str, BeforeValidator(_check_count)]
"""A whole number of at least 1, or a range such as `1..4`."""


class Section(BaseModel):
    """A group of settings: frozen, without unknown names, and with `ConfigError` as its error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
        defer_build=True,
    )

    PATH: ClassVar[str] = ""
    """Name of the section within a run, for messages."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(_first_message(type(self), error)) from None

    # pydantic then builds the sections of a run without this method, so that their errors arrive
    # at the run with the whole path of the setting.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_half_characters(cls, value: object) -> object:
        """Refuse text that no file can hold: pydantic finds it in some types of text only."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
                raise PydanticKnownError("string_unicode")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changed settings, validated like a new section.

        Raises:
            ConfigError: the changed section is not valid.
        """
        return type(self)(
            **{name: getattr(self, name) for name in type(self).model_fields} | changes
        )


# ---- what a researcher sets ------------------------------------------------------------------


class DataConfig(Section):
    """Where the dialogues come from, and which of them become prompts."""

    PATH = "data"

    path: Annotated[
        Address, Field(min_length=1), Remedy("give a file, a folder, a hub id or `lab`")
    ] = "lab"
    """`lab` (the embedded corpus), a .jsonl, .json, .csv or .parquet file or folder, `s3://` or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    configuration: str | None = None
    """Configuration of a hub dataset."""
    split: NonEmpty = "train"
    """Split of a hub dataset, or of a folder whose file names say their splits."""
    dialogue_column: NonEmpty = "dialogue"
    """Column with the text that goes into the prompt."""
    summary_column: str | None = "summary"
    """Column with the reference summary, for ROUGE-L; null if there is none."""
    min_chars: Annotated[int, Field(ge=0)] = 200
    """Dialogues must have more characters than this."""
    max_chars: int = 1000
    """Dialogues may have at most this many characters."""
    template: str = "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"
    """Text of a prompt; the dialogue replaces `{dialogue}`."""
    max_prompt_tokens: AtLeastOne = 512
    """Longer prompts are left out; the run reports how many and which."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1), _PARSE] = 0.2
    """Share of the rows that the run never trains on."""
    held_out_rows: Literal["hashed", "last"] = "hashed"
    """Which rows are held out: `hashed` (by a hash of the text) or `last` (the end of the file)."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Largest number of rows to read; null reads all."""
    shards: AtLeastOne = 16
    """Number of fixed, equal parts of the prompts; every worker holds at least one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "{dialogue}" not in self.template:
            raise ConfigError(
                f"data.template is {self.template!r}; expected text that contains {{dialogue}}."
            )
        if self.max_chars <= self.min_chars:
            raise ConfigError(
                f"data.max_chars ({self.max_chars}) leaves no length above data.min_chars "
                f"({self.min_chars}). Raise data.max_chars."
            )
        return self


class PolicyConfig(Section):
    """The encoder-decoder that is trained, and the LoRA adapter that trains it."""

    PATH = "policy"

    model: Annotated[Address, Field(min_length=1), Remedy("give a hub id, a folder or `lab`")] = (
        "lab"
    )
    """`lab` (the embedded T5), a hub id, a local folder or `s3://...`."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    adapter: Address | None = None
    """Starting adapter (peft folder or hub id); training continues from it and KL is measured to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward passes: `float32`, `bfloat16`, or `auto` (bfloat16 on a GPU that has it)."""
    lora_rank: AtLeastOne = 16
    """Rank of the LoRA matrices; a starting adapter keeps its own."""
    lora_alpha: AtLeastOne = 32
    """LoRA scale times rank."""
    lora_dropout: Annotated[float, Field(ge=0, le=0.99), _PARSE] = 0.0
    """Dropout stored with the adapter; PPO itself runs without dropout, so that the first ratio is 1."""
    lora_targets: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        _LIST,
        Remedy("name the layers to adapt, such as [q, v]"),
    ] = ("q", "v")
    """Names of the linear layers that get an adapter."""
    frozen_encoder: bool = False
    """Adapt the decoder only: one encoding of the prompt then serves sampling, reference and training."""
    forced_bos_token: str | None = None
    """Token that every response starts with, such as the language `fra_Latn` of a translation model;
    null takes the model's own `forced_bos_token_id`, if it has one."""


class SamplingConfig(Section):
    """How the policy samples a response to a prompt."""

    PATH = "sampling"

    temperature: Positive = 1.0
    """Divides the logits, both while sampling and in the loss."""
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    """The end-of-sequence token has probability zero in this many first positions, also in the loss;
    null takes the minimum that the model's author set, which most models do not have."""
    max_new_tokens: CountOrRange = 48
    """Longest response in tokens, end-of-sequence included: a number, or a range such as `100..399`
    from which every prompt gets a random limit."""
    batch_size: AtLeastOne = 32
    """Prompts per sampling batch on one worker; scoring one batch overlaps sampling the next."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.min_new_tokens or 0) >= self.lowest_limit:
            raise ConfigError(
                f"sampling.min_new_tokens is {self.min_new_tokens}; expected less than "
                f"sampling.max_new_tokens ({self.max_new_tokens})."
            )
        return self

    @property
    def lowest_limit(self) -> int:
        """Smallest response limit that a prompt can get, in tokens."""
        return count_range(self.max_new_tokens)[0]

    @property
    def highest_limit(self) -> int:
        """Largest response limit that a prompt can get, in tokens."""
        return count_range(self.max_new_tokens)[1]


RESERVED_TERM_NAMES = frozenset(
    "response reward toxicity length truncated finished rouge_l facts judge".split()
)
"""Fields of an evaluated response; a reward term of the same name would overwrite one of them."""


def _check_term_name(name: str) -> str:
    if name and not re.fullmatch(r"[\w.-]+", name):
        raise ValueError("letters, digits, '_', '-' and '.'")
    return name


class ClassifierConfig(Section):
    """A sequence classifier, and which of its outputs is the score."""

    PATH = "reward.terms.classifier"

    model: Annotated[Address, Field(min_length=1), Remedy("give a hub id, a folder or `lab`")] = (
        "lab"
    )
    """`lab` (the embedded RoBERTa), a hub id, a local folder or `s3://...` of a sequence classifier."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    label: Annotated[NonEmpty, Remedy("name the label for not toxic")] | None = "nothate"
    """Label that means not toxic, looked up by name; its raw logit is the score."""
    toxic_label: Annotated[NonEmpty, Remedy("name the label for toxic")] | None = None
    """Label that means toxic, in place of `label`: the score then rises as its probability falls."""
    head: Literal["auto", "softmax", "sigmoid"] = "auto"
    """Probabilities from logits: `softmax` over all labels, `sigmoid` of each label, or `auto` (sigmoid
    if the model's problem_type is multi-label or it has one output)."""
    input: Literal["response", "prompt+response"] = "response"
    """Text that the classifier scores: `response`, or `prompt+response`."""
    batch_size: AtLeastOne = 32
    """Texts per forward pass of the classifier; `reward.batch_size` is also the unit of work sent to an
    actor."""
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Longer texts are truncated and counted; null takes the model's own limit."""

    @model_validator(mode="before")
    @classmethod
    def _toxic_label_replaces_default(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("toxic_label") is not None:
            return {"label": None} | settings
        return settings

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if (self.label is None) == (self.toxic_label is None):
            raise ConfigError(
                f"{self.PATH}.label is {self.label!r} and {self.PATH}.toxic_label is "
                f"{self.toxic_label!r}; expected one of them. Name the label that means not toxic or "
                "the one that means toxic, and set the other to null."
            )
        return self


class RewardTerm(Section):
    """One extra part of the reward: a function in TRL's protocol, or another classifier."""

    PATH = "reward.terms"

    function: str | None = None
    """Import path of `f(completions, prompts=..., completion_ids=..., **columns) -> list[float]`."""
    classifier: ClassifierConfig | None = None
    """Another classifier, in place of `function`; its score is the value."""
    weight: Number = 1.0
    """Factor of the value in the reward; 0 measures the term and does not train on it."""
    arguments: Annotated[dict[str, Any], AfterValidator(_check_json)] | None = None
    """If given, `function` is first called with these and returns the reward function."""
    name: Annotated[str, AfterValidator(_check_term_name)] = ""
    """Name of the term in metrics and results; by default that of the function or the model."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or settings.get("name"):
            return settings
        classifier = settings.get("classifier")
        if isinstance(settings.get("function"), str):
            name = settings["function"].rpartition(".")[2]
        elif classifier is not None:
            model = classifier.get("model") if isinstance(classifier, dict) else classifier.model
            last = str(model or "lab").rstrip("/").rpartition("/")[2]
            name = re.sub(r"[^\w.-]+", "_", last)
        else:
            return settings
        return settings | {"name": name}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.function is None) == (self.classifier is None):
            raise PydanticCustomError("incomplete", "give either `function` or `classifier`")
        if self.function is not None and "." not in self.function:
            raise ConfigError(
                f"reward.terms: {self.function!r} is not an import path; write module.function, "
                "such as trl.rewards.get_repetition_penalty_reward."
            )
        if self.classifier is not None and self.arguments is not None:
            raise ConfigError(
                f"reward.terms: the classifier {self.name!r} has arguments "
                f"{self.arguments}; only a function takes them. Leave them out."
            )
        return self


class RewardConfig(ClassifierConfig):
    """The reward: a classifier, and any further functions and classifiers."""

    PATH = "reward"

    weight: Number = 1.0
    """Factor of the classifier's score in the reward; 0 measures toxicity and does not train on it."""
    terms: Annotated[tuple[RewardTerm, ...], _LIST] = ()
    """Extra functions and classifiers, whose weighted values are added to the classifier's score."""
    check_sentences: bool = True
    """Refuse a reward that prefers an insult to a thank-you, before anything is trained."""
    actors: CountOrRange = 1
    """Reward actors, each with its own copy of the classifiers: a number, or `1..4` to follow the load."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"reward.terms names {', '.join(names)}: two terms share a name. Set `name` of one "
                "of them."
            )
        for term in self.terms:
            if term.name in RESERVED_TERM_NAMES:
                kind = "function" if term.function is not None else "classifier"
                raise ConfigError(
                    f"reward.terms names a {kind} {term.name!r}, and results have a field of that "
                    "name. Set `name` of the term to another one."
                )
        if not any((self.weight, *(term.weight for term in self.terms))):
            raise ConfigError(
                "reward.weight is 0, and no term of reward.terms has another weight: the reward of "
                "every response would be 0. Give one of them a weight."
            )
        return self

    @property
    def classifiers(self) -> tuple[tuple[str, ClassifierConfig], ...]:
        """All classifiers, each with the setting that describes it; the first measures toxicity."""
        return (
            (self.PATH, self),
            *(
                (f"reward.terms[{i}].classifier", term.classifier)
                for i, term in enumerate(self.terms)
                if term.classifier is not None
            ),
        )

    def scoring_settings(self) -> dict[str, Any]:
        """Return the settings on which the score of a response depends, as JSON values.

        `batch_size` is one of them: texts that share a forward pass round together.
        """
        return self.model_dump(mode="json", exclude={"actors", "check_sentences"})

    @property
    def min_actors(self) -> int:
        """Reward actors that a run always has."""
        return count_range(self.actors)[0]

    @property
    def max_actors(self) -> int:
        """Reward actors that a run may grow to."""
        return count_range(self.actors)[1]


class PPOConfig(Section):
    """How the policy learns from one rollout."""

    PATH = "ppo"

    prompts_per_step: AtLeastOne = 64
    """Prompts per PPO step, over all workers; each gets one response."""
    epochs: AtLeastOne = 2
    """Passes over each rollout."""
    minibatches: AtLeastOne = 2
    """Optimiser steps per pass."""
    micro_batch_size: AtLeastOne = 32
    """Sequences per forward and backward pass on one worker; gradients add up. For memory only."""
    learning_rate: NonNegative = 1e-3
    """Adam step size for the LoRA weights, and for a shared critic's value head."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm; a detached critic's by themselves."""
    clip_range: Annotated[float, Field(gt=0, le=1), _PARSE] = 0.2
    """Largest move of the probability ratio from 1 that the policy loss rewards."""
    critic: Literal["none", "detached", "shared"] = "none"
    """Baseline of the advantages: `none` (values of 0), `detached` (a value head whose loss trains only
    itself), or `shared` (a value head whose loss also trains the policy, as in TRL)."""
    critic_learning_rate: Positive = 1e-3
    """Adam step size for a detached critic."""
    value_clip_range: Positive | None = None
    """Largest move of a value from its estimate at sampling time that the value loss rewards; null
    does not limit it."""
    value_coef: NonNegative = 0.1
    """Weight of a shared critic's loss beside the policy loss."""
    kl_coef: NonNegative = 0.15
    """KL coefficient: cost of one nat of KL(policy || reference), in units of reward-model score."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where KL(policy || reference) is charged: in the `reward` of each token, as the log ratio (k1), or in
    the `loss`, as half its square (k2). Both have the gradient of this KL; no other estimator does."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`fixed` keeps kl_coef; `adaptive` raises it while the KL of a response exceeds adaptive_kl_target,
    and lowers it again below."""
    adaptive_kl_target: Positive = 6.0
    """KL per response, in nats, that the adaptive controller aims at."""
    adaptive_kl_horizon: AtLeastOne = 10_000
    """Responses over which the adaptive controller reacts; more than a fifth of prompts_per_step."""
    adaptive_kl_coef_min: NonNegative | None = None
    """Smallest KL coefficient of the adaptive controller; null takes kl_coef, so that a KL below the
    target never becomes cheaper. 0 is the controller of TRL."""
    recompute_logprobs: bool = False
    """Score sampled responses anew with teacher forcing before the update; one more pass per step. It
    removes what decoding token by token rounds differently, not what another batch shape does."""
    target_kl: Positive | None = None
    """An update stops early when its KL per token from the sampling policy exceeds this, in nats."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 1.0
    """0 trusts the critic, 1 trusts the rewards; without a critic it discounts later rewards."""
    max_kl: Positive | None = 60.0
    """The run stops when the KL of a response to the reference exceeds this, in nats, mean of a step;
    null never stops it. Useful runs stay below 10; the recipe lab without a KL penalty reaches 20 to 50."""
    stop_on_collapse: bool = True
    """Stop the run if the policy has lost its entropy, or no longer ends its responses."""
    unfinished_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that its limit cut before end-of-sequence."""
    bootstrap_unfinished: bool = False
    """Give a response that its limit cut the critic's value at the cut in place of its score: what the
    finished response would have earned (Pardo et al. 2018, arXiv:1712.00378). Needs a critic."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompts_per_step % self.minibatches:
            nearest = self.minibatches * max(
                1, (self.prompts_per_step + (self.minibatches - 1) // 2) // self.minibatches
            )
            raise ConfigError(
                f"ppo.prompts_per_step ({self.prompts_per_step}) does not divide into "
                f"ppo.minibatches ({self.minibatches}). Use a multiple, such as {nearest}."
            )
        if self.bootstrap_unfinished and self.critic == "none":
            raise ConfigError(
                "ppo.bootstrap_unfinished is true with ppo.critic=none; expected a critic, whose value "
                "takes the place of the score. Set ppo.critic=detached, or ppo.bootstrap_unfinished=false."
            )
        if self.kl_controller == "adaptive":
            self._check_adaptive_kl()
        elif self.adaptive_kl_coef_min is not None:
            raise ConfigError(
                f"ppo.adaptive_kl_coef_min is {self.adaptive_kl_coef_min:g} with "
                "ppo.kl_controller=fixed; expected null, since only the adaptive controller uses it. "
                "Set ppo.adaptive_kl_coef_min=null, or ppo.kl_controller=adaptive."
            )
        return self

    def _check_adaptive_kl(self) -> None:
        if self.kl_coef == 0:
            raise ConfigError(
                "ppo.kl_coef is 0 with ppo.kl_controller=adaptive; expected a value above 0, since "
                "the controller multiplies it, and 0 stays 0. Set ppo.kl_coef=0.05, or "
                "ppo.kl_controller=fixed."
            )
        # The controller reacts to an error of at most a fifth, so at this horizon one step could
        # take the coefficient to zero, where it stays for ever.
        if self.adaptive_kl_horizon * 5 <= self.prompts_per_step:
            raise ConfigError(
                f"ppo.adaptive_kl_horizon is {self.adaptive_kl_horizon}; expected more than a fifth "
                f"of ppo.prompts_per_step ({self.prompts_per_step}), or one step could take the KL "
                f"coefficient to zero or below. Use at least {10 * self.prompts_per_step}."
            )
        if self.kl_coef_min > self.kl_coef:
            raise ConfigError(
                f"ppo.adaptive_kl_coef_min is {self.kl_coef_min:g}; expected at most ppo.kl_coef "
                f"({self.kl_coef:g}), with which the run starts."
            )

    @property
    def kl_coef_min(self) -> float:
        """Smallest KL coefficient that the adaptive controller sets."""
        return self.kl_coef if self.adaptive_kl_coef_min is None else self.adaptive_kl_coef_min

    @property
    def minibatch_size(self) -> int:
        """Sequences per optimiser step, over all workers."""
        return self.prompts_per_step // self.minibatches


class TrainConfig(Section):
    """How long PPO runs, on how many workers, and what it keeps."""

    PATH = "train"

    steps: AtLeastOne = 40
    """PPO steps: rollout, scores, update."""
    workers: CountOrRange = 2
    """Ray Train workers, each with its share of every step's prompts: a number, or `2..4` to continue
    with fewer when nodes are lost, and with more when they come back."""
    checkpoint_every: AtLeastOne = 1
    """PPO steps between checkpoints; the next step starts while one is written."""
    checkpoints_kept: AtLeastOne = 2
    """Newest checkpoints kept, beside the best one."""
    probe_prompts: Annotated[int, Field(ge=0)] = 32
    """Training prompts, always the same, with which checkpoints are compared to find the best one; 0
    measures none, and then no checkpoint is the best."""
    probe_every: AtLeastOne = 5
    """PPO steps between two such measurements; each samples and scores the probe prompts once."""
    storage: Address | None = None
    """Folder or `s3://...` for checkpoints that every node can reach; null takes the run's own folder."""
    unsaved_warning_s: Positive = 60.0
    """Seconds that checkpoints wait for a storage that fails or is slow before every step prints a
    warning."""
    max_unsaved_s: Positive | None = None
    """Seconds that checkpoints wait for the storage before the run ends with an error, with those that
    are already there; null waits for ever."""

    @property
    def min_workers(self) -> int:
        """Workers without which a run does not continue."""
        return count_range(self.workers)[0]

    @property
    def max_workers(self) -> int:
        """Workers that a run uses if the cluster has the resources."""
        return count_range(self.workers)[1]


class EvaluateConfig(Section):
    """The measurement before and after, on held-out prompts."""

    PATH = "evaluate"

    prompts: Annotated[int, Field(ge=2)] = 512
    """Different held-out prompts to measure before and after; fewer if fewer are held out."""
    batch_size: AtLeastOne = 64
    """Prompts per sampling batch."""
    shards: AtLeastOne = 8
    """Ray tasks that share the prompts; each one's result is kept when it is done."""
    toxicity_threshold: Share = 0.5
    """Probability of hate above which a response counts as toxic."""
    judge: Literal["none", "profanity-check"] = "none"
    """Second opinion on toxicity: `none` or `profanity-check` (needs the extra `judge`)."""
    min_change: NonNegative = 0.005
    """Smallest mean change of toxicity that counts as an improvement."""
    max_rouge_l_drop: NonNegative = 0.05
    """Largest relative loss of ROUGE-L that still counts as an improvement."""
    max_facts_drop: NonNegative = 0.10
    """Largest relative loss of the dialogue's facts that still counts as an improvement."""
    max_length_change: NonNegative = 0.15
    """Largest relative change of length that still counts as an improvement."""
    max_kl: NonNegative = 10.0
    """Largest KL per response, in nats, that still counts as an improvement."""


# ---- what the operator of a cluster sets -----------------------------------------------------


class ServingConfig(Section):
    """How reward actors are placed, batched, watched and scaled."""

    PATH = "serving"

    cpus_per_actor: NonNegative = 1.0
    """CPUs held by one reward actor."""
    gpus_per_actor: NonNegative | None = None
    """GPUs held by one reward actor, fractions allowed; null takes 0.25 if training uses GPUs."""
    timeout_s: Positive = 120.0
    """Seconds to wait for the scores of one batch before the run stops with an error."""
    heartbeat_timeout_s: Positive = 10.0
    """Heartbeat timeout in seconds: a silent actor is pinged, then its work is re-dispatched. Set it
    above the time of one call of a reward term."""
    max_actor_deaths: AtLeastOne = 3
    """Times that an actor may start and die in a row while it scores the same texts, until the run
    stops with an error: a reward function that crashes on a text would kill every actor."""
    upscale_delay_s: Positive = 5.0
    """With a range of actors: seconds that texts must wait before the pool adds an actor."""
    downscale_delay_s: Positive = 60.0
    """With a range of actors: seconds that actors must be idle before the pool removes one."""
    batch_across_workers: bool = False
    """Let an actor fill a batch from all workers: faster if each has few texts, but scores then differ
    by rounding from run to run."""
    max_batch_tokens: AtLeastOne = 4096
    """Tokens that a batch across workers may hold."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000), _PARSE] = 3.0
    """Milliseconds that a batch across workers waits for more texts."""


class ClusterConfig(Section):
    """The Ray cluster, what a training worker takes of it, and how a run follows its changes."""

    PATH = "cluster"

    address: Annotated[Host, Field(min_length=1), Remedy("use auto, local or host:port")] = "auto"
    """`auto` (the cluster this process was submitted to, else a local one), `local`, or `host:port`."""
    capacity_timeout_s: NonNegative = 60.0
    """Seconds to wait for resources: nodes that are being added or busy; 0 expects them at once."""
    cpus_per_worker: Positive = 1.0
    """CPUs held by one training worker, and its torch threads."""
    gpus_per_worker: NonNegative | None = None
    """GPUs held by one training worker; null takes 1 if the cluster has one for every worker, else 0."""
    upscale_delay_s: NonNegative = 30.0
    """With a range of workers: seconds that resources must be free before the run adds a worker."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures of the worker group between two checkpoints; each time it resumes from the newest one."""


class ResultsConfig(Section):
    """Where results are stored."""

    PATH = "results"

    store: Literal["sqlite", "dynamodb"] = "sqlite"
    """`sqlite` (one file in the output folder) or `dynamodb`."""
    table: Annotated[NonEmpty, Remedy("name the DynamoDB table")] = "ray-detox"
    """DynamoDB table."""
    region: str | None = None
    """AWS region; null takes AWS_REGION or AWS_DEFAULT_REGION."""
    endpoint_url: Host | None = None
    """Another DynamoDB endpoint, for emulators."""


class RunConfig(Section):
    """One run, from prompts to results."""

    recipe: str = "lab"
    """Name of the recipe that this run started from."""
    description: str = ""
    """What the recipe is for, in a sentence."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of the order of the data, response limits, sampling, minibatches, new adapter weights and the
    report's intervals. The held-out rows do not depend on it, so runs with other seeds are comparable."""
    data: DataConfig = Field(default_factory=DataConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    serving: ServingConfig = Field(default_factory=ServingConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    results: ResultsConfig = Field(default_factory=ResultsConfig)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.max_workers > self.data.shards:
            raise ConfigError(
                f"train.workers ({self.train.workers}) is more than data.shards "
                f"({self.data.shards}), and each worker holds at least one shard. Ask for fewer "
                "workers, or raise data.shards."
            )
        if self.ppo.prompts_per_step % self.data.shards:
            raise ConfigError(
                f"ppo.prompts_per_step ({self.ppo.prompts_per_step}) is not a multiple of "
                f"data.shards ({self.data.shards}), so workers would get unequal shares. "
                f"Set data.shards to a divisor of {self.ppo.prompts_per_step}."
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain JSON values; `config_from_dict` is the inverse."""
        return self.model_dump(mode="json")


# ---- messages --------------------------------------------------------------------------------

RENAMED = {
    "data.lanes": "data.shards",
    "sampling.budget_min": "sampling.max_new_tokens",
    "sampling.budget_max": "sampling.max_new_tokens",
    "reward.reads": "reward.input",
    "reward.deadline_s": "serving.timeout_s",
    "reward.silence_s": "serving.heartbeat_timeout_s",
    "reward.grow_after_s": "serving.upscale_delay_s",
    "reward.shrink_after_s": "serving.downscale_delay_s",
    "reward.across_workers": "serving.batch_across_workers",
    "reward.batch_tokens": "serving.max_batch_tokens",
    "train.grow_after_s": "cluster.upscale_delay_s",
    "cluster.patience_s": "cluster.capacity_timeout_s",
    "ppo.stop_update_kl": "ppo.target_kl",
    "ppo.kl_target": "ppo.adaptive_kl_target",
    "ppo.kl_horizon": "ppo.adaptive_kl_horizon",
    "ppo.kl_estimator": "ppo.kl_in",
    "evaluate.toxic_above": "evaluate.toxicity_threshold",
}
"""Former names of settings, which are refused like any unknown name."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "string_type": "text",
    "string_unicode": "text",
    "bool_type": "true or false",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "names with values",
    "model_type": "a section, such as {name}.key=value",
}


def _first_message(section: type[Section], error: ValidationError) -> str:
    """Return the message for the first error; unknown names come before invalid values."""
    errors = error.errors(include_url=False)
    unknown = [each for each in errors if each["type"] == "extra_forbidden"]
    return _message(section, (unknown or errors)[0])


def _message(section: type[Section], error: ErrorDetails) -> str:
    where = [part for part in error["loc"] if part not in ("int", "str", "[key]")]
    name = section.PATH
    for part in where:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    value, kind, bounds = error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        owner, _ = _resolve(section, where[:-1])
        return f"Unknown setting {name!r}; {_suggestion(owner, name, str(where[-1]))}"
    if kind == "missing":
        parent = name.rpartition(".")[0] or "The run"
        return f"{parent} is incomplete: {where[-1]} is missing."
    if kind == "incomplete":
        return f"{name} is incomplete: {error['msg']}."
    if kind == "credentials":
        return credentials_in(name)
    if kind == "value_error":
        reason = bounds["error"]
        if isinstance(reason, ConfigError):
            return str(reason)
        return f"{name} is {value!r}; expected {reason}."
    _, field = _resolve(section, where)
    metadata = field.metadata if field else []
    if kind in ("string_too_short", "too_short"):
        remedy = [item.text for item in metadata if isinstance(item, Remedy)]
        return f"{name} is empty; {remedy[0] if remedy else 'give a value'}."
    if kind == "literal_error":
        choices = bounds["expected"].replace("'", "").replace(" or ", ", ")
        return f"{name} is {value!r}; expected one of {choices}."
    if kind in _EXPECTED:
        return f"{name} is {value!r}; expected {_EXPECTED[kind].format(name=name)}."
    if not set(bounds) & {"ge", "gt", "le", "lt"}:  # a kind without a sentence of ours
        return f"{name} is {value!r}: {error['msg']}."
    return f"{name} is {value!r}; expected {_range(metadata, bounds)}."


def _range(metadata: Sequence[Any], violated: dict[str, Any]) -> str:
    """Describe the range of a number, as its field states it."""
    limits = dict(violated)
    for item in metadata:
        for bound in ("ge", "gt", "le", "lt"):
            if getattr(item, bound, None) is not None:
                limits[bound] = getattr(item, bound)
    limits = {bound: limit for bound, limit in limits.items() if isinstance(limit, int | float)}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    # Whole numbers in full: 2^63 - 1, rounded up, would be a value that is refused.
    show = lambda limit: str(limit) if isinstance(limit, int) else f"{limit:g}"
    if low is not None and high is not None:
        if "ge" in limits and "le" in limits:
            return f"a value from {show(low)} to {show(high)}"
        if "gt" in limits and "lt" in limits:
            return f"a value between {show(low)} and {show(high)}"
        least = f"at least {show(low)}" if "ge" in limits else f"above {show(low)}"
        most = f"at most {show(high)}" if "le" in limits else f"below {show(high)}"
        return f"a value {least} and {most}"
    if high is not None:
        return f"at most {show(high)}"
    return f"at least {show(low)}" if "ge" in limits else f"a value above {show(low or 0)}"


def _resolve(
    section: type[Section], where: Sequence[str | int]
) -> tuple[type[Section], FieldInfo | None]:
    """Follow a path of names and positions to a field, and to the section that it holds."""
    owner, field = section, None
    for part in where:
        if isinstance(part, str):
            field = owner.model_fields.get(part)
        inner = [t for t in _types_in(field.annotation) if issubclass(t, Section)] if field else []
        owner = inner[0] if inner else owner
    return owner, field


def _types_in(annotation: Any) -> list[type]:
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return [t for inner in get_args(annotation) for t in _types_in(inner)]
    return [annotation] if isinstance(annotation, type) else []


def is_text(dotted: str) -> bool:
    """Return whether the value of a setting such as `data.template` can only be text.

    So is that of an unknown setting, which is refused whatever its value is.
    """
    types = _value_types(dotted)
    return types is None or types == {str}


def is_optional_text(dotted: str) -> bool:
    """Return whether the value of a setting such as `policy.revision` is text or null."""
    return _value_types(dotted) == {str, type(None)}


def setting_exists(dotted: str) -> bool:
    """Return whether there is a setting of this name."""
    return _value_types(dotted) is not None


def _value_types(dotted: str) -> set[type] | None:
    """Return the types of a setting's values; None if there is no such setting."""
    _, field = _resolve(RunConfig, dotted.split("."))
    return None if field is None else set(_leaf_types(field.annotation))


def _leaf_types(annotation: Any) -> list[type]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [type(value) for value in inner]
    if origin is Annotated:
        return _leaf_types(inner[0])
    if origin in (Union, types.UnionType):
        return [each for part in inner for each in _leaf_types(part)]
    return [annotation if isinstance(annotation, type) else object]


def _suggestion(owner: type[Section], name: str, key: str) -> str:
    """Name the setting that was probably meant, or all that exist in this place."""
    prefix = name[: len(name) - len(key)]
    known = list(owner.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    homes = [
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        for inner in _types_in(field.annotation)
        if issubclass(inner, Section) and key in inner.model_fields
    ]
    if name in RENAMED:
        return f"did you mean {RENAMED[name]!r}?"
    if homes:  # the very name, in another section
        return f"did you mean {homes[0]!r}?"
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    return f"known {'in ' + prefix.rstrip('.') if prefix else 'here'}: {', '.join(known)}."
