"""Generation settings of a model's author, as part of the policy's distribution.

`generate` of transformers changes the logits by the model's generation settings (the file
generation_config.json, or older fields of config.json): a translation model starts every response
with its language, a summariser ends at the limit, some tokens never occur. A policy that ignored
them would train another distribution than the one the model is used with. `Constraints` applies
them alike while sampling and while scoring, so the loss sees the distribution that was sampled.

    in force                                             applies to
    decoder_start_token_id                               the decoder's first input
    forced_bos_token_id, or policy.forced_bos_token      the first token
    forced_eos_token_id                                  the last token that the limit allows
    min_new_tokens, else min_length (unless sampling.min_new_tokens is set)
    bad_words_ids, suppress_tokens, the pad token        every token
    begin_suppress_tokens                                the first token that is not forced

Settings of search (`num_beams`) and of other distributions (`top_k`, `repetition_penalty`) are not
in force; `settings_in_force` names both groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.errors import ConfigError
from ray_detox.models.sources import local_folder

IN_FORCE = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
)
"""Generation settings that the policy follows, beside the ids of its special tokens."""

NOT_IN_FORCE = (
    "num_beams",
    "num_beam_groups",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "length_penalty",
    "exponential_decay_length_penalty",
    "diversity_penalty",
    "penalty_alpha",
    "sequence_bias",
    "guidance_scale",
    "forced_decoder_ids",
    "temperature",
    "max_length",
    "max_new_tokens",
)
"""Generation settings that PPO cannot follow, or that the section `sampling` replaces."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "top_k": (0, 50),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "temperature": (1.0,),
    "max_length": (20,),
}
"""Values that change nothing, or that transformers writes into files by itself."""

LOWEST = torch.finfo(torch.float32).min
"""Logit of a token that cannot occur: its probability is exactly zero, and no difference is NaN."""


@dataclass(frozen=True, slots=True)
class GenerationRules:
    """The token ids and lengths that generation with a model follows."""

    start_id: int
    """First input of the decoder."""
    pad_id: int
    eos_ids: tuple[int, ...]
    forced_bos_id: int | None = None
    """The only possible first token."""
    forced_eos_ids: tuple[int, ...] = ()
    """The only possible tokens at the limit of a response."""
    min_new_tokens: int = 0
    """End-of-sequence is impossible in this many first positions."""
    forbidden: tuple[int, ...] = ()
    """Tokens that never occur; the pad token is one of them unless it ends sequences."""
    forbidden_at_begin: tuple[int, ...] = ()
    """Tokens that cannot be the first one that is not forced."""
    forbidden_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of two or more tokens that never occur."""


def generation_config(folder: Path) -> GenerationConfig:
    """Return the generation settings that `from_pretrained` reads from a model's folder."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return GenerationConfig.from_model_config(config)


def generation_rules(
    generation: GenerationConfig,
    config: PreTrainedConfig,
    sampling: SamplingConfig,
    forced_bos_id: int | None = None,
    vocabulary: int | None = None,
) -> GenerationRules:
    """Return the rules that a model's settings amount to.

    Args:
        generation: the model's generation settings.
        config: the model's config, for ids that the generation settings do not have.
        sampling: its `min_new_tokens` replaces that of the model, if it is set.
        forced_bos_id: replaces the model's `forced_bos_token_id`, if it is not None.
        vocabulary: V, the number of logits; None checks no token id.

    Raises:
        ConfigError: the model names no end-of-sequence token or no first decoder token, its
            shortest response does not fit `sampling.max_new_tokens`, a token that it needs is not
            in its vocabulary, or what it forbids leaves no response to choose.
    """

    def setting(name: str) -> Any:
        value = getattr(generation, name, None)
        return getattr(config, name, None) if value is None else value

    eos_ids = _ids(setting("eos_token_id"))
    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start  # as `generate` does
    for name, missing in (
        ("eos_token_id", not eos_ids),
        ("decoder_start_token_id", start is None),
    ):
        if missing:
            raise ConfigError(
                f"policy.model has no {name}, so responses can neither start nor end as its author "
                f"meant. Set {name} in its {GENERATION_CONFIG_NAME}."
            )
    if isinstance(start, list | tuple):
        raise ConfigError(
            f"policy.model has decoder_start_token_id {list(start)}, one for each row of a batch; "
            f"expected one id. Set it to one id in its {GENERATION_CONFIG_NAME}."
        )
    pad = setting("pad_token_id")
    pad_id = eos_ids[0] if pad is None else int(pad)
    if forced_bos_id is None:
        forced_bos_id = generation.forced_bos_token_id
    forced_eos_ids = _ids(generation.forced_eos_token_id)
    if vocabulary is not None:
        needed = {
            "decoder_start_token_id": (int(start),),
            "pad_token_id": (pad_id,),
            "eos_token_id": eos_ids,
            "forced_bos_token_id": _ids(forced_bos_id),
            "forced_eos_token_id": forced_eos_ids,
        }
        _check_vocabulary(needed, vocabulary)

    # Like `generate`, which never forbids end-of-sequence as a bad word.
    bad_words = [tuple(ids) for ids in generation.bad_words_ids or ()]
    bad_words = [ids for ids in bad_words if not (len(ids) == 1 and ids[0] in eos_ids)]
    forbidden = {pad_id} - set(eos_ids)
    forbidden |= {ids[0] for ids in bad_words if len(ids) == 1}
    forbidden |= set(generation.suppress_tokens or ())
    forbidden_at_begin = set(generation.begin_suppress_tokens or ())
    if vocabulary is not None:  # a token without a logit never occurs anyway
        tokens = set(range(vocabulary))
        forbidden, forbidden_at_begin = forbidden & tokens, forbidden_at_begin & tokens
        bad_words = [ids for ids in bad_words if tokens.issuperset(ids)]
        _check_choice(tokens, forbidden, forbidden_at_begin, set(eos_ids))
    if forced_bos_id in eos_ids:
        raise ConfigError(
            f"policy.model forces token {forced_bos_id}, its end-of-sequence, to be the first, so "
            "every response is this one token. Set policy.forced_bos_token to another token, or "
            f"remove forced_bos_token_id from its {GENERATION_CONFIG_NAME}."
        )
    return GenerationRules(
        start_id=int(start),
        pad_id=pad_id,
        eos_ids=eos_ids,
        forced_bos_id=forced_bos_id,
        forced_eos_ids=forced_eos_ids,
        min_new_tokens=_min_new_tokens(generation, sampling),
        forbidden=tuple(sorted(forbidden)),
        forbidden_at_begin=tuple(sorted(forbidden_at_begin)),
        forbidden_sequences=tuple(ids for ids in bad_words if len(ids) > 1),
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


def _check_vocabulary(needed: Mapping[str, Sequence[int]], vocabulary: int) -> None:
    """Check that the tokens that a response needs have logits.

    Args:
        needed: token ids by the setting that names them.
        vocabulary: V, the number of logits.

    Raises:
        ConfigError: one of them has none.
    """
    for name, ids in needed.items():
        for token in ids:
            if not 0 <= token < vocabulary:
                also = ", or policy.forced_bos_token" if name == "forced_bos_token_id" else ""
                raise ConfigError(
                    f"policy.model has {name} {token}, and its vocabulary has the ids 0 to "
                    f"{vocabulary - 1}. Correct it in its {GENERATION_CONFIG_NAME}{also}."
                )


def _check_choice(
    tokens: set[int], forbidden: set[int], forbidden_at_begin: set[int], eos_ids: set[int]
) -> None:
    """Check that forbidden tokens leave something to sample, and a way to end.

    Raises:
        ConfigError: they do not.
    """
    ordinary, reason = tokens - eos_ids, None
    if ordinary <= forbidden:
        reason = "every token but end-of-sequence (bad_words_ids, suppress_tokens)"
    elif eos_ids <= forbidden:
        reason = "its end-of-sequence (suppress_tokens), so no response can end"
    elif ordinary <= forbidden | forbidden_at_begin:
        reason = "every first token but end-of-sequence (begin_suppress_tokens)"
    if reason is not None:
        raise ConfigError(f"policy.model forbids {reason}. Correct its {GENERATION_CONFIG_NAME}.")


def _min_new_tokens(generation: GenerationConfig, sampling: SamplingConfig) -> int:
    if sampling.min_new_tokens is not None:
        return sampling.min_new_tokens
    # Like `generate`: `min_new_tokens` replaces `min_length`, which counts the decoder's start token.
    shortest = generation.min_new_tokens
    if shortest is None:
        shortest = max((generation.min_length or 0) - 1, 0)
    if shortest >= sampling.lowest_limit:
        raise ConfigError(
            f"policy.model sets a minimum of {shortest} tokens before end-of-sequence, and "
            f"sampling.max_new_tokens is {sampling.max_new_tokens}. Raise "
            "sampling.max_new_tokens, or set sampling.min_new_tokens to replace the model's."
        )
    return int(shortest)


def forced_bos_id(tokenizer: Any, policy: PolicyConfig) -> int | None:
    """Return the id of `policy.forced_bos_token`, None if it is not set.

    Raises:
        ConfigError: the token is not in the vocabulary.
    """
    token = policy.forced_bos_token
    if token is None:
        return None
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ConfigError(
            f"policy.forced_bos_token is {token!r}, and the tokenizer of {policy.model} has no "
            "such token. Use a token of its vocabulary, such as the code of a language."
        )
    return int(found)


def check_language(rules: GenerationRules, tokenizer: Any, name: str) -> None:
    """Check that a multilingual model is told the language of its responses.

    Such a model learns the language from a token that the decoder gets: as its start token or as
    its forced first token.

    Raises:
        ConfigError: neither names a language.
    """
    multilingual = hasattr(tokenizer, "tgt_lang")
    ordinary = {rules.pad_id, *rules.eos_ids, tokenizer.bos_token_id}
    if multilingual and rules.forced_bos_id is None and rules.start_id in ordinary:
        raise ConfigError(
            f"policy.model is {name!r}, a multilingual model that does not say in which language "
            "it responds. Set policy.forced_bos_token to the code of the language, such as "
            "fra_Latn for NLLB or fr_XX for mBART."
        )


def settings_in_force(
    generation: GenerationConfig, sampling: SamplingConfig
) -> tuple[list[str], list[str]]:
    """Return the author's generation settings, as `name=value`: those in force and those not."""

    def given(names: Sequence[str]) -> list[str]:
        found = []
        for name in names:
            value = getattr(generation, name, None)
            unset = value is None or value is False or value in ([], 0, 0.0)
            if unset or value in _NEUTRAL.get(name, ()):
                continue
            if isinstance(value, list) and len(value) > 3:
                found.append(f"{name} ({len(value)} entries)")
            else:
                found.append(f"{name}={value}")
        return found

    replaced: tuple[str, ...] = ()
    if sampling.min_new_tokens is not None:
        replaced = ("min_length", "min_new_tokens")
    elif generation.min_new_tokens is not None:
        replaced = ("min_length",)
    in_force = given([name for name in IN_FORCE if name not in replaced])
    return in_force, given([*NOT_IN_FORCE, *replaced])


def describe_generation(policy: PolicyConfig, sampling: SamplingConfig) -> list[str]:
    """Return sentences about the author's generation settings, for checks and reports.

    Raises:
        ConfigError: the model does not exist, or cannot be reached.
    """
    folder = local_folder(policy.model, policy.revision, "policy.model", weights=False)
    in_force, not_in_force = settings_in_force(generation_config(folder), sampling)
    sentences = []
    if in_force:
        sentences.append(
            f"Of the model's generation settings, {', '.join(in_force)} are in force, both while "
            "sampling and in the loss."
        )
    if not_in_force:
        sentences.append(
            f"Of the model's generation settings, {', '.join(not_in_force)} are not in force: PPO "
            "samples from the policy's own distribution, and the section sampling sets its lengths."
        )
    return sentences


class Constraints:
    """Applies `GenerationRules` to logits."""

    def __init__(self, rules: GenerationRules) -> None:
        self.rules = rules
        self.needs_history = bool(rules.forbidden_sequences)
        """True if `apply_` reads decoder inputs before those of the given logits."""
        self._begin = 0 if rules.forced_bos_id is None else 1
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    def _index(self, name: str, device: torch.device) -> Tensor:
        """Return token ids of the rules as a tensor, copied to a device once."""
        key = (name, device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(getattr(self.rules, name), device=device)
        return self._indices[key]

    @torch.no_grad()
    def apply_(
        self,
        logits: Tensor,
        decoder_ids: Tensor,
        limits: Tensor | None,
        first_position: int = 0,
    ) -> None:
        """Change logits in place, so that softmax gives the constrained distribution.

        Args:
            logits: [B, R, V] float32 after temperature, of the response positions from
                `first_position` on. No operation of the graph may need their former values.
            decoder_ids: [B, T] inputs of the decoder, the last of which gave the last logits; T is
                `first_position + R` if `needs_history`, and at least R otherwise.
            limits: [B] int64, limit of each response in tokens; None forces no end-of-sequence.
            first_position: position in the response of the first logits.

        The changes are not recorded for the gradient, which remains right: a token that cannot
        occur has probability 0 and a forced one probability 1, so the gradient of the
        log-probability with respect to their logits is 0. This spares a copy of [B, R, V].
        """
        rules, device = self.rules, logits.device
        logits, end = logits.detach(), first_position + logits.shape[1]
        if rules.forbidden:
            logits.index_fill_(2, self._index("forbidden", device), LOWEST)
        if first_position <= self._begin < end and rules.forbidden_at_begin:
            ids = self._index("forbidden_at_begin", device)
            logits[:, self._begin - first_position].index_fill_(1, ids, LOWEST)
        if rules.min_new_tokens > first_position:
            early = logits[:, : rules.min_new_tokens - first_position]
            early.index_fill_(2, self._index("eos_ids", device), LOWEST)
        for sequence in rules.forbidden_sequences:
            _forbid_sequence(logits, decoder_ids, sequence, first_position)
        if first_position == 0 and rules.forced_bos_id is not None:
            logits[:, 0] = LOWEST
            logits[:, 0, rules.forced_bos_id] = 0.0
        if rules.forced_eos_ids and limits is not None:
            at = limits - 1 - first_position
            rows = ((at >= 0) & (at < logits.shape[1])).nonzero()[:, 0]
            if len(rows):
                forced = torch.full_like(logits[0, 0], LOWEST)
                forced[self._index("forced_eos_ids", device)] = 0.0
                logits[rows, at[rows]] = forced


def _forbid_sequence(
    logits: Tensor, decoder_ids: Tensor, sequence: Sequence[int], first_position: int
) -> None:
    """Forbid the last token of a sequence wherever the decoder has read the tokens before it."""
    *before, last = sequence
    size = len(before)
    if decoder_ids.shape[1] < size:
        return
    windows = decoder_ids.unfold(1, size, 1)  # [B, T - size + 1, size]
    matches = (windows == torch.tensor(before, device=logits.device)).all(dim=2)
    # The window that starts at input i ends at input i + size - 1, which gives the logits of the
    # response token at that position.
    skipped = max(0, first_position - (size - 1))
    matches = matches[:, skipped:]
    start = max(0, size - 1 - first_position)
    logits[:, start:, last].masked_fill_(matches, LOWEST)
