"""Every knob of a run, in one place, checked when the run is described.

A run is a recipe (a YAML file, packaged or the user's own) plus overrides such as
`ppo.kl_coef=0.1`. What can be known to be wrong from the description alone is refused
here, in one sentence; what needs a look at files, models or the cluster is `preflight.py`.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A run was described in a way that cannot work; the message is for the person who did."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    _require(value in choices, f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def _require_at_least(name: str, value: float, least: float) -> None:
    _require(value >= least, f"{name} is {value}; expected at least {least}.")


def _require_between(name: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, f"{name} is {value}; expected a value from {low} to {high}.")


def _span(name: str, value: int | str) -> tuple[int, int]:
    """Least and most of a count that is fixed (`2`) or may move (`1..4`)."""
    least, dots, most = str(value).partition("..")
    ends = (least, most if dots else least)
    if all(end.isascii() and end.isdecimal() for end in ends):
        low, high = (int(end) for end in ends)
        if 1 <= low <= high:
            return low, high
    raise ConfigError(
        f"{name} is {value!r}; expected a whole number of at least 1, or a range such as 1..4."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the dialogues come from, and which of them become prompts."""

    path: str = "lab"
    """`lab` (the embedded corpus), a .jsonl, .csv or .parquet file or folder, `s3://...`, or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    dialogue_column: str = "dialogue"
    """Column with the text that goes into the prompt."""
    summary_column: str | None = "summary"
    """Column with the reference summary, for ROUGE-L; null where there is none."""
    min_chars: int = 200
    """Dialogues must have more characters than this."""
    max_chars: int = 1000
    """Dialogues may have at most this many characters."""
    template: str = "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"
    """Text of a prompt, with `{dialogue}` where the dialogue goes."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, counted and named."""
    held_out_fraction: float = 0.2
    """Share of the rows that is never trained on."""
    held_out_rows: str = "hashed"
    """Which rows are held out: `hashed` (by a hash of the text) or `last` (the end of the file)."""
    limit: int | None = None
    """Rows read at most; null reads all."""
    lanes: int = 16
    """Fixed equal parts that the prompts are dealt into; every worker holds at least one."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "data.path is empty; give a file, a folder, a hub id or `lab`.")
        _require(
            "{dialogue}" in self.template,
            f"data.template is {self.template!r}; expected text that contains {{dialogue}}.",
        )
        _require_at_least("data.min_chars", self.min_chars, 0)
        _require(
            self.max_chars > self.min_chars,
            f"data.max_chars ({self.max_chars}) leaves no length above data.min_chars "
            f"({self.min_chars}). Raise data.max_chars.",
        )
        _require_at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        _require(
            0 < self.held_out_fraction < 1,
            f"data.held_out_fraction is {self.held_out_fraction}; expected a value between 0 and 1.",
        )
        _require_choice("data.held_out_rows", self.held_out_rows, ("hashed", "last"))
        if self.limit is not None:
            _require_at_least("data.limit", self.limit, 2)
        _require_at_least("data.lanes", self.lanes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The encoder-decoder that is trained, and the LoRA adapter that trains it."""

    model: str = "lab"
    """`lab` (the embedded T5), a hub id, a local folder or `s3://...`."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    adapter: str | None = None
    """Starting adapter (peft folder or hub id); training goes on from it and KL is measured to it."""
    dtype: str = "auto"
    """Arithmetic of the forward passes: `float32`, `bfloat16`, or `auto` (bfloat16 on a GPU that has it)."""
    lora_rank: int = 16
    """Rank of the LoRA matrices; a starting adapter brings its own."""
    lora_alpha: int = 32
    """LoRA scale times rank."""
    lora_dropout: float = 0.0
    """Written into the adapter; PPO itself runs without dropout, so that the first ratio is 1."""
    lora_targets: tuple[str, ...] = ("q", "v")
    """Names of the linear layers that get an adapter."""
    frozen_encoder: bool = False
    """Adapt the decoder only: the prompt is then encoded once for sampling, reference and training."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "policy.model is empty; give a hub id, a folder or `lab`.")
        _require_choice("policy.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _require_at_least("policy.lora_rank", self.lora_rank, 1)
        _require_at_least("policy.lora_alpha", self.lora_alpha, 1)
        _require_between("policy.lora_dropout", self.lora_dropout, 0, 0.99)
        _require(
            len(self.lora_targets) > 0,
            "policy.lora_targets is empty; name the layers to adapt, such as [q, v].",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the policy answers a prompt."""

    temperature: float = 1.0
    """Logits are divided by this, while sampling and in the loss alike."""
    min_new_tokens: int = 0
    """The end-of-sequence token is barred from this many first positions, while sampling and in the loss."""
    budget_min: int = 48
    """Least response budget: each prompt's budget is drawn from budget_min..budget_max tokens."""
    budget_max: int = 48
    """Greatest response budget, end-of-sequence token included."""
    batch_size: int = 32
    """Prompts that one worker answers at a time; scoring one batch overlaps sampling the next."""

    def __post_init__(self) -> None:
        _require(
            self.temperature > 0,
            f"sampling.temperature is {self.temperature}; expected a value above 0.",
        )
        _require_at_least("sampling.budget_min", self.budget_min, 1)
        _require(
            self.budget_max >= self.budget_min,
            f"sampling.budget_max ({self.budget_max}) is less than sampling.budget_min "
            f"({self.budget_min}). Swap them or raise budget_max.",
        )
        _require(
            0 <= self.min_new_tokens < self.budget_min,
            f"sampling.min_new_tokens is {self.min_new_tokens}; expected from 0 to less than "
            f"sampling.budget_min ({self.budget_min}).",
        )
        _require_at_least("sampling.batch_size", self.batch_size, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One extra reward function in TRL's protocol, added to the classifier's score."""

    function: str
    """Import path of `f(completions, prompts=..., completion_ids=..., **columns) -> list[float]`."""
    weight: float = 1.0
    """Multiplies the function's value before it is added."""
    arguments: dict[str, Any] | None = None
    """If given, `function` is first called with these and returns the reward function."""

    @property
    def name(self) -> str:
        """What the term is called in logs."""
        return self.function.rpartition(".")[2]

    def __post_init__(self) -> None:
        _require(
            "." in self.function,
            f"reward.terms: {self.function!r} is no import path; write module.function, such as "
            "trl.rewards.get_repetition_penalty_reward.",
        )
        _require(
            math.isfinite(self.weight), f"reward.terms: weight is {self.weight}; expected a number."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """The reward model and the actors that host it."""

    model: str = "lab"
    """`lab` (the embedded RoBERTa), a hub id, a local folder or `s3://...` of a sequence classifier."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    label: str = "nothate"
    """Label whose raw logit is the score; looked up by name."""
    reads: str = "response"
    """What the classifier reads: `response`, or `prompt+response`."""
    terms: tuple[RewardTerm, ...] = ()
    """Extra reward functions beside the classifier."""
    batch_size: int = 32
    """Texts per forward pass of the classifier; also the unit of work sent to an actor."""
    max_tokens: int | None = None
    """Longer texts are truncated and counted; null takes the model's own limit."""
    actors: int | str = 1
    """Reward actors, each with its own copy of the classifier: a number, or `1..4` to follow the load."""
    cpus_per_actor: float = 1.0
    """CPUs held by one reward actor."""
    gpus_per_actor: float | None = None
    """GPUs held by one reward actor, fractions allowed; null takes 0.25 where training uses GPUs."""
    deadline_s: float = 120.0
    """Longest wait for the scores of one batch before the run stops with an error."""
    silence_s: float = 10.0
    """An actor that has said nothing for this long is asked whether it lives; if not, another scores.
    Let it be longer than one call of a reward term takes."""
    grow_after_s: float = 5.0
    """Where actors may move: one more is asked for once texts have waited for this long."""
    shrink_after_s: float = 60.0
    """Where actors may move: one is let go once some have had nothing to do for this long."""
    across_workers: bool = False
    """Let an actor fill a batch from all workers: faster where each has few texts; scores then differ
    by rounding from run to run."""
    batch_tokens: int = 4096
    """Tokens that a batch across workers may hold."""
    batch_wait_ms: float = 3.0
    """Milliseconds that a batch across workers waits for more."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "reward.model is empty; give a hub id, a folder or `lab`.")
        _require_choice("reward.reads", self.reads, ("response", "prompt+response"))
        _require_at_least("reward.batch_size", self.batch_size, 1)
        if self.max_tokens is not None:
            _require_at_least("reward.max_tokens", self.max_tokens, 8)
        _span("reward.actors", self.actors)
        _require_at_least("reward.cpus_per_actor", self.cpus_per_actor, 0)
        if self.gpus_per_actor is not None:
            _require_at_least("reward.gpus_per_actor", self.gpus_per_actor, 0)
        for name in ("deadline_s", "silence_s", "grow_after_s", "shrink_after_s"):
            value = getattr(self, name)
            _require(value > 0, f"reward.{name} is {value}; expected a value above 0.")
        _require_at_least("reward.batch_tokens", self.batch_tokens, 1)
        _require_between("reward.batch_wait_ms", self.batch_wait_ms, 0, 1000)
        names = [term.name for term in self.terms]
        _require(
            len(set(names)) == len(names),
            f"reward.terms names {', '.join(names)}: two terms share a name. Wrap one of them.",
        )

    @property
    def least_actors(self) -> int:
        """Reward actors that a run always has."""
        return _span("reward.actors", self.actors)[0]

    @property
    def most_actors(self) -> int:
        """Reward actors that a run may grow to."""
        return _span("reward.actors", self.actors)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """How the policy learns from one rollout."""

    prompts_per_step: int = 64
    """Prompts answered per PPO step, over all workers."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 2
    """Optimiser steps per pass."""
    micro_batch_size: int = 32
    """Sequences per forward and backward pass on one worker; gradients add up. For memory only."""
    learning_rate: float = 1e-3
    """Adam step size for the LoRA weights and the value head."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    clip_range: float = 0.2
    """How far the probability ratio may move from 1 before it stops paying."""
    value_clip_range: float = 0.2
    """How far a value may move from the one estimated while sampling before it stops paying."""
    value_coef: float = 0.1
    """Weight of the value loss beside the policy loss."""
    kl_coef: float = 0.15
    """Price of one nat of KL to the reference, in units of reward-model score."""
    kl_estimator: str = "k1"
    """Per-token estimate of the KL: `k1` (log ratio), `k2` (half its square), `k3` (never negative)."""
    kl_in: str = "reward"
    """Where the price is paid: in the `reward` of each token, or in the `loss` by its own gradient."""
    kl_controller: str = "fixed"
    """`fixed` keeps kl_coef; `adaptive` steers the KL of a response towards kl_target."""
    kl_target: float = 6.0
    """KL per response, in nats, that the adaptive controller aims at."""
    kl_horizon: int = 10_000
    """Responses over which the adaptive controller reacts."""
    stop_update_kl: float | None = None
    """An update ends early once its KL per token from the sampling policy exceeds this, in nats."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """0 trusts the value head, 1 trusts the rewards."""

    def __post_init__(self) -> None:
        _require_at_least("ppo.prompts_per_step", self.prompts_per_step, 1)
        _require_at_least("ppo.minibatches", self.minibatches, 1)
        if self.prompts_per_step % self.minibatches:
            nearest = self.minibatches * max(1, round(self.prompts_per_step / self.minibatches))
            raise ConfigError(
                f"ppo.prompts_per_step ({self.prompts_per_step}) does not divide into "
                f"ppo.minibatches ({self.minibatches}). Use a multiple, such as {nearest}."
            )
        _require_at_least("ppo.epochs", self.epochs, 1)
        _require_at_least("ppo.micro_batch_size", self.micro_batch_size, 1)
        _require_at_least("ppo.learning_rate", self.learning_rate, 0)
        for name in ("max_grad_norm", "clip_range", "value_clip_range"):
            value = getattr(self, name)
            _require(value > 0, f"ppo.{name} is {value}; expected a value above 0.")
        _require_between("ppo.clip_range", self.clip_range, 0, 0.999)
        _require_at_least("ppo.value_coef", self.value_coef, 0)
        _require_at_least("ppo.kl_coef", self.kl_coef, 0)
        _require_choice("ppo.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        _require_choice("ppo.kl_in", self.kl_in, ("reward", "loss"))
        _require(
            not (self.kl_in == "loss" and self.kl_estimator == "k1"),
            "ppo.kl_estimator=k1 with ppo.kl_in=loss has a gradient of zero on average. "
            "Use k2 or k3, or ppo.kl_in=reward.",
        )
        _require_choice("ppo.kl_controller", self.kl_controller, ("fixed", "adaptive"))
        _require(self.kl_target > 0, f"ppo.kl_target is {self.kl_target}; expected above 0 nats.")
        _require_at_least("ppo.kl_horizon", self.kl_horizon, 1)
        if self.stop_update_kl is not None:
            _require(
                self.stop_update_kl > 0,
                f"ppo.stop_update_kl is {self.stop_update_kl}; expected a value above 0 or null.",
            )
        _require_between("ppo.gamma", self.gamma, 0, 1)
        _require_between("ppo.gae_lambda", self.gae_lambda, 0, 1)

    @property
    def minibatch_size(self) -> int:
        """Sequences per optimiser step, over all workers."""
        return self.prompts_per_step // self.minibatches


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and where PPO runs."""

    steps: int = 40
    """PPO steps: rollout, scores, update."""
    workers: int | str = 2
    """Ray Train workers, each with its share of every step's prompts: a number, or `2..4` to go on
    with fewer where nodes are lost, and with more where they come back."""
    grow_after_s: float = 30.0
    """Where workers may move: one more is taken in once there has been room for it for this long."""
    cpus_per_worker: float = 1.0
    """CPUs held by one worker, and its torch threads."""
    gpus_per_worker: float | None = None
    """GPUs held by one worker; null takes 1 where the cluster has one for every worker, else 0."""
    checkpoint_every: int = 1
    """PPO steps between checkpoints; writing one goes on beside the next step."""
    checkpoints_kept: int = 2
    """Newest checkpoints kept, beside the best one."""
    storage: str | None = None
    """Folder or `s3://...` for checkpoints that every node can reach; null takes the run's own folder."""
    max_failures: int = 3
    """Times the worker group may fail between two checkpoints; it goes on from the newest one."""

    def __post_init__(self) -> None:
        _require_at_least("train.steps", self.steps, 1)
        _span("train.workers", self.workers)
        _require_at_least("train.grow_after_s", self.grow_after_s, 0)
        _require(
            self.cpus_per_worker > 0,
            f"train.cpus_per_worker is {self.cpus_per_worker}; expected a value above 0.",
        )
        if self.gpus_per_worker is not None:
            _require_at_least("train.gpus_per_worker", self.gpus_per_worker, 0)
        _require_at_least("train.checkpoint_every", self.checkpoint_every, 1)
        _require_at_least("train.checkpoints_kept", self.checkpoints_kept, 1)
        _require_at_least("train.max_failures", self.max_failures, 0)

    @property
    def least_workers(self) -> int:
        """Workers without which a run does not go on."""
        return _span("train.workers", self.workers)[0]

    @property
    def most_workers(self) -> int:
        """Workers that a run has where there is room."""
        return _span("train.workers", self.workers)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """The measurement before and after, on held-out prompts."""

    prompts: int = 512
    """Held-out prompts answered before and after; fewer if fewer are held out."""
    batch_size: int = 64
    """Prompts answered at a time."""
    shards: int = 8
    """Ray tasks that share the prompts; each is kept once it is done."""
    toxic_above: float = 0.5
    """Probability of hate above which a response counts as toxic."""
    judge: str = "none"
    """Second opinion on toxicity: `none` or `profanity-check` (needs the extra `judge`)."""
    min_change: float = 0.005
    """Smallest mean change of toxicity that counts as an improvement."""
    max_rouge_l_drop: float = 0.05
    """Largest relative loss of ROUGE-L that still counts as an improvement."""
    max_facts_drop: float = 0.10
    """Largest relative loss of the dialogue's facts that still counts as an improvement."""
    max_length_change: float = 0.15
    """Largest relative change of length that still counts as an improvement."""
    max_kl: float = 10.0
    """Largest KL per response, in nats, that still counts as an improvement."""

    def __post_init__(self) -> None:
        _require_at_least("evaluate.prompts", self.prompts, 2)
        _require_at_least("evaluate.batch_size", self.batch_size, 1)
        _require_at_least("evaluate.shards", self.shards, 1)
        _require_between("evaluate.toxic_above", self.toxic_above, 0, 1)
        _require_choice("evaluate.judge", self.judge, ("none", "profanity-check"))
        for name in (
            "min_change",
            "max_rouge_l_drop",
            "max_facts_drop",
            "max_length_change",
            "max_kl",
        ):
            _require_at_least(f"evaluate.{name}", getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsConfig:
    """Where results are stored."""

    store: str = "sqlite"
    """`sqlite` (one file in the output folder) or `dynamodb`."""
    table: str = "ray-detox"
    """DynamoDB table."""
    region: str | None = None
    """AWS region; null takes AWS_REGION or AWS_DEFAULT_REGION."""
    endpoint_url: str | None = None
    """Another DynamoDB endpoint, for emulators."""

    def __post_init__(self) -> None:
        _require_choice("results.store", self.store, ("sqlite", "dynamodb"))
        _require(bool(self.table), "results.table is empty; name the DynamoDB table.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Which Ray cluster the run uses."""

    address: str = "auto"
    """`auto` (the cluster this process was submitted to, else a local one), `local`, or `host:port`."""
    patience_s: float = 60.0
    """Longest wait for what the run needs: nodes that are being added or busy; 0 asks it to be there."""

    def __post_init__(self) -> None:
        _require(bool(self.address), "cluster.address is empty; use auto, local or host:port.")
        _require_at_least("cluster.patience_s", self.patience_s, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, from prompts to results."""

    recipe: str = "lab"
    """Name of the recipe that this run started from."""
    description: str = ""
    """What the recipe is for, in a sentence."""
    seed: int = 0
    """Seeds the split, the shuffle, the response budgets, sampling, minibatches and new weights."""
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _require_between("seed", self.seed, 0, 2**63 - 1)
        _require(
            self.train.most_workers <= self.data.lanes,
            f"train.workers ({self.train.workers}) are more than data.lanes ({self.data.lanes}), and "
            "each holds at least one lane. Ask for fewer workers, or raise data.lanes.",
        )
        if self.ppo.prompts_per_step % self.data.lanes:
            raise ConfigError(
                f"ppo.prompts_per_step ({self.ppo.prompts_per_step}) is no multiple of data.lanes "
                f"({self.data.lanes}), so workers would get unequal shares. "
                f"Set data.lanes to a divisor of {self.ppo.prompts_per_step}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The run as plain JSON values; `config_from_dict` is the way back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain
