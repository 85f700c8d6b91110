"""Try an architecture: a tiny random copy of it samples, scores and merges like a real policy.

Whether an encoder-decoder can be trained is not a matter of its name. Its decoder has to be causal,
the same with and without a cache, and independent of the other rows of a batch; text has to reach
every adapted layer; and the adapter has to be removable and mergeable. `failed_trial` builds the
model from its config with small sizes and the run's own adapter settings, and looks.
"""

import copy
import hashlib
import importlib.metadata
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ray_detox import __version__
from ray_detox.config import SamplingConfig
from ray_detox.errors import first_line
from ray_detox.models.constraints import GenerationRules
from ray_detox.models.loading import build_policy
from ray_detox.models.policy import Policy
from ray_detox.models.sources import cache_folder
from ray_detox.records import TokenBatch

SIZES = (
    (r"(\w+_)?layers|num_hidden_layers", 2),
    (r"num_key_value_heads", 2),
    (r"(\w+_)?heads", 4),
    (r"d_kv|(\w+_)?head_dim", 8),
    (r"hidden_size|d_model", 32),
    (r"intermediate_size|d_ff|(\w+_)?ffn_dim", 48),
    (r"num_experts", 2),
)
"""Patterns of names in a config, with the largest value that a tiny copy takes."""

TOLERANCE = 1e-3
"""Largest difference, in nats, that rounding in float32 explains."""

LONGEST = 80
"""Tokens of a trial's responses, if the run allows as many: beyond the 64 tokens that an expert of
SwitchTransformers accepts."""


def shrunken(
    config: PreTrainedConfig, largest_id: int, *, widths: bool = True, depth: bool = True
) -> PreTrainedConfig:
    """Return a copy of a config with few layers, narrow ones, and a small vocabulary.

    Args:
        config: of the model.
        largest_id: largest token id that the vocabulary has to hold.
        widths: False keeps the widths, for a config that allows no other.
        depth: False keeps the number of layers, for an adapter that names one of the upper layers.
    """
    sizes = (SIZES[:1] if depth else ()) + (SIZES[1:] if widths else ())

    def ids(settings: Mapping[str, Any]) -> Iterator[int]:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                yield from ids(value)
            elif str(name).endswith(("_token_id", "_token_index")) and isinstance(value, int):
                yield value

    # 64 ordinary tokens beside the special ones.
    vocabulary = max(largest_id, *ids(config.to_dict()), 0) + 65

    def small(settings: Mapping[str, Any]) -> dict[str, Any]:
        depths = {v for k, v in settings.items() if re.fullmatch(SIZES[0][0], str(k))}
        found: dict[str, Any] = {}
        for name, value in settings.items():
            limit = next((s for p, s in sizes if re.fullmatch(p, str(name))), None)
            if isinstance(value, Mapping):
                found[name] = small(value)
            elif depth and isinstance(value, list) and len(value) in depths:  # one entry per layer
                found[name] = value[: SIZES[0][1]]
            elif not isinstance(value, int) or isinstance(value, bool):
                found[name] = value
            elif str(name).endswith("vocab_size"):
                found[name] = min(value, vocabulary)
            else:
                found[name] = value if limit is None else min(value, limit)
        return found

    return type(config).from_dict(small(config.to_dict()))


def tiny_model(
    config: PreTrainedConfig,
    rules: GenerationRules,
    *,
    tied: bool = True,
    widths: bool = True,
    depth: bool = True,
) -> PreTrainedModel:
    """Build a tiny random model of a config's architecture, whose logits differ by several nats.

    Args:
        config: of the real model.
        rules: its special tokens are kept, its other constraints are not.
        tied: False gives the head a weight of its own.
        widths: as in `shrunken`.
        depth: as in `shrunken`.
    """
    special = (rules.start_id, rules.pad_id, *rules.eos_ids)
    small = shrunken(config, max(special), widths=widths, depth=depth)
    # In float32 also for a model that was saved in half precision, whose rounding is no fault.
    model = AutoModelForSeq2SeqLM.from_config(small, dtype=torch.float32, trust_remote_code=False)
    head = model.get_output_embeddings()
    if not tied and isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=rules.start_id,
        pad_token_id=rules.pad_id,
        eos_token_id=list(rules.eos_ids),
    )
    return model.requires_grad_(False).eval()


def failed_trial(
    config: PreTrainedConfig,
    rules: GenerationRules,
    adapter: LoraConfig,
    sampling: SamplingConfig,
    *,
    tied: bool = True,
) -> str | None:
    """Try a model's architecture with an adapter.

    Args:
        config: of the model.
        rules: of the model.
        adapter: peft's settings.
        sampling: of the run; responses are as long as it allows, but at most `LONGEST`.
        tied: whether the model's head shares the embedding's weight, if its family can.

    Returns:
        None, or what a tiny copy of the model does wrong, as the end of a sentence.
    """
    adapter = copy.deepcopy(adapter)
    adapter.inference_mode, adapter.r = False, min(adapter.r, 4)
    adapter.rank_pattern = {
        name: min(rank, 4) for name, rank in (adapter.rank_pattern or {}).items()
    }
    error: Exception | None = None
    for widths in (True, False):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ties that this copy does not have
            torch.manual_seed(0)
            try:
                base = tiny_model(config, rules, tied=tied, widths=widths)
                if widths and not _matches(base, adapter):
                    base = tiny_model(config, rules, tied=tied, depth=False)
                return _contract(base, adapter, min(sampling.highest_limit, LONGEST))
            # Whatever the code of an architecture raises, the policy cannot use it.
            except Exception as failure:
                error = error or failure
    assert error is not None, "the loop returns if no trial fails"
    return f"its forward pass fails ({type(error).__name__}: {first_line(error)})"


def cached_trial(
    config: PreTrainedConfig,
    rules: GenerationRules,
    adapter: LoraConfig,
    sampling: SamplingConfig,
    *,
    tied: bool = True,
) -> str | None:
    """Return the result of `failed_trial`, from an earlier trial of the same settings if there was one."""
    longest = min(sampling.highest_limit, LONGEST)
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft")]
    special = (rules.start_id, rules.pad_id, rules.eos_ids)
    settings = [config.to_dict(), adapter.to_dict(), special, longest, tied, __version__, versions]
    text = json.dumps(settings, sort_keys=True, default=_as_json)
    file = cache_folder() / "trials" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, KeyError):
        known: str | None = json.loads(file.read_text(encoding="utf-8"))["failure"]
        return known
    failure = failed_trial(config, rules, adapter, sampling, tied=tied)
    with suppress(OSError):  # the cache only saves time
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"failure": failure}) + "\n", encoding="utf-8")
    return failure


def _as_json(value: Any) -> Any:
    """Return a set, such as peft's `target_modules`, in an order that every process gives it."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _matches(base: PreTrainedModel, adapter: LoraConfig) -> bool:
    """Return whether a model has a layer that an adapter names."""
    try:
        get_peft_model(copy.deepcopy(base), copy.deepcopy(adapter))
    except ValueError:
        return False
    return True


def _contract(base: PreTrainedModel, adapter: LoraConfig, longest: int) -> str | None:
    """Check the properties that PPO relies on; the first that fails is returned."""
    plain = copy.deepcopy(base)
    model = get_peft_model(base, adapter)
    length = SamplingConfig(max_new_tokens=longest, min_new_tokens=longest - 1)
    policy = build_policy(model, length, critic="shared")
    for parameter in policy.trainable().values():
        nn.init.normal_(parameter, std=0.3)

    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(max(0, vocabulary - 64), vocabulary, mask.shape)
    query_ids = torch.where(mask, ids, policy.pad_id)
    noise = torch.rand(len(mask), longest)
    limits = torch.tensor([longest, max(longest // 2, 1), longest])
    generation = policy.sample(query_ids, mask, limits, noise)
    tokens = generation.tokens

    scores = policy.score_tokens(tokens)
    (scores.logprobs.sum() + scores.values.sum()).backward()
    logprobs = scores.logprobs.detach()
    gap = float((logprobs - generation.logprobs).abs().max())
    if not gap < TOLERANCE:
        return (
            f"it rates the tokens that it sampled differently, by up to {gap:.2g} nats, when it reads "
            "them all at once"
        )
    gap = max(_gap_alone(policy, tokens, logprobs, row) for row in range(len(mask)))
    if not gap < TOLERANCE:
        return f"a response's probability depends on the rest of its batch, by up to {gap:.2g} nats"
    untouched = [
        name
        for name, parameter in policy.trainable().items()
        if parameter.grad is None or not parameter.grad.any()
    ]
    if untouched:
        layer = re.sub(r"^model\.|base_model\.model\.|\.lora_.*$", "", untouched[0])
        return (
            f"text does not reach the adapted layer {layer}; adapt other layers, or set "
            "policy.frozen_encoder=true to adapt the decoder only"
        )
    with policy.as_reference():
        off = _logits(model, policy, tokens)
    if not torch.allclose(off, _logits(plain, policy, tokens), atol=TOLERANCE):
        return "it is not the base model when the adapter is off, so it has no reference"
    on = _logits(model, policy, tokens)
    merged = _logits(model.merge_and_unload(), policy, tokens)
    if not torch.allclose(on, merged, atol=TOLERANCE * max(1.0, float(on.abs().max()))):
        return "it gives other logits when the adapter is merged into it, so it cannot be exported"
    return None


@torch.no_grad()
def _gap_alone(policy: Policy, tokens: TokenBatch, logprobs: Tensor, row: int) -> float:
    """Return the largest difference between a row's log-probabilities alone and in the batch."""
    alone = policy.score_tokens(tokens.select(torch.tensor([row]))).logprobs[0]
    return float((alone - logprobs[row, : len(alone)]).abs().max())


@torch.no_grad()
def _logits(model: Any, policy: Policy, tokens: TokenBatch) -> Tensor:
    start = torch.full_like(tokens.response_ids[:, :1], policy.start_id)
    logits: Tensor = model(
        input_ids=tokens.query_ids,
        attention_mask=tokens.query_mask.long(),
        decoder_input_ids=torch.cat([start, tokens.response_ids[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    return logits[:, : tokens.response_ids.shape[1]][tokens.response_mask]
