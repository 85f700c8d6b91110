"""The policy: an encoder-decoder with a LoRA adapter and, with a critic, a value head.

It samples responses, scores tokens, and is its own reference: the same weights with the adapter
off (or, if training starts from an adapter, with a frozen copy of that adapter on), so there is no
second model in memory. It knows nothing of rewards, PPO or Ray.

The model stays in eval() although it is trained: dropout would change log-probabilities between
sampling and update, and the very first ratio would no longer be 1. Gradients flow all the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from ray_detox.config import SamplingConfig
from ray_detox.errors import NonFiniteError
from ray_detox.models.constraints import Constraints, generation_rules
from ray_detox.models.output_head import find_head, head_width, run_in_float32, vocabulary_size
from ray_detox.records import Generation, TokenBatch

# Progress bars and notices about tied weights would hide this package's own output.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

REFERENCE = "reference"
POLICY = "default"

COMPACTION_THRESHOLD = 0.75
"""Finished rows leave the decoder's batch when less than this share of its rows is unfinished.
Removing rows copies the key-value cache, so it has to save more than the copy costs."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The policy's output for given response tokens; every tensor is [B, R] float32."""

    logprobs: Tensor
    """Log-probability of each token."""
    values: Tensor
    """The value estimated just before each token; 0 without a critic."""


class Policy(nn.Module):
    """A sequence-to-sequence model that samples responses, scores tokens and can be trained.

    Args:
        model: the peft model, whose adapter "default" is trained; it may also have a frozen adapter
            "reference", otherwise the reference is the model with the adapter off.
        sampling: temperature and min_new_tokens; both are part of the distribution, so sampling and
            scoring apply them alike. So are the constraints that the model's author set.
        frozen_encoder: True if no encoder layer has an adapter.
        dtype: dtype of the forward passes; adapter, output head, value head and losses stay float32.
        forced_bos_id: token that every response starts with; None takes the model's own.
        value_head: maps the decoder's last hidden states [B, R, D] to values [B, R, 1]; without one
            all values are 0.

    Raises:
        ConfigError: the model has no output head, or does not say how responses start and end.
    """

    def __init__(
        self,
        model: PeftModel,
        sampling: SamplingConfig,
        frozen_encoder: bool = False,
        dtype: torch.dtype = torch.float32,
        forced_bos_id: int | None = None,
        value_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        base = model.get_base_model()
        head = find_head(base)
        self.model = model
        self.sampling = sampling
        self.frozen_encoder = frozen_encoder
        self.dtype = dtype
        self.hidden_size = head_width(head)
        self.value_head = value_head
        rules = generation_rules(
            base.generation_config, base.config, sampling, forced_bos_id, vocabulary_size(head)
        )
        self.pad_id: int = rules.pad_id
        self.eos_ids: list[int] = list(rules.eos_ids)
        self.start_id: int = rules.start_id
        self.constraints = Constraints(rules)
        self._hidden: Tensor | None = None
        self._encoder_output: type[Any] = BaseModelOutput
        self._is_reference = False
        # The value head needs the decoder's last hidden state. Hooks capture it, because the
        # alternative, output_hidden_states, keeps the states of all layers in memory.
        if dtype == torch.bfloat16:
            run_in_float32(head)
        head.register_forward_pre_hook(self._capture_head_input)
        base.get_decoder().register_forward_hook(self._capture_hidden)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights and of sampled tensors."""
        return next(self.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters of adapter and value head, sorted by name."""
        return {n: p for n, p in sorted(self.named_parameters()) if p.requires_grad}

    # ---- forward passes ----------------------------------------------------------------------

    def _capture_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        # A decoder that contains the head returns logits; the head's input is captured by then.
        if output[0].shape[-1] == self.hidden_size:
            self._hidden = output[0]

    def _capture_head_input(self, module: nn.Module, args: Any) -> None:
        # The decoder's own output is preferred: T5 v1.0 scales it before the head.
        if self._hidden is None:
            self._hidden = args[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def encode(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """Return encoder states [B, Q, D] of right-padded prompts [B, Q]."""
        encoder = self.model.get_base_model().get_encoder()
        # A frozen encoder needs no gradient; without a graph its activations are not kept.
        with (
            self._autocast(),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder),
        ):
            output = encoder(input_ids=query_ids, attention_mask=query_mask.long())
        # Mixtures of experts read more fields of the output than BaseModelOutput has.
        self._encoder_output = type(output)
        states: Tensor = output[0]
        return states

    def _decode(
        self,
        states: Tensor,
        query_mask: Tensor,
        decoder_ids: Tensor,
        cache: Any = None,
        query_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits [B, R, V] after temperature, and values [B, R], both float32.

        The prompt itself, `query_ids`, is not encoded again; but without a cache FSMT's decoder is
        causal only if the prompt is given.
        """
        with self._autocast():
            output = self.model.get_base_model()(
                input_ids=query_ids,
                encoder_outputs=self._encoder_output(last_hidden_state=states),
                attention_mask=query_mask.long(),
                decoder_input_ids=decoder_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        assert self._hidden is not None, "the decoder's forward hook did not run"
        hidden, self._hidden = self._hidden.float(), None
        if self.value_head is None:
            values = hidden.new_zeros(hidden.shape[:2])
        else:
            values = self.value_head(hidden).squeeze(-1)
        logits = output.logits.float()
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        return logits, values

    @torch.no_grad()
    def sample(
        self, query_ids: Tensor, query_mask: Tensor, max_new_tokens: Tensor, noise: Tensor
    ) -> Generation:
        """Sample a response to each prompt by inverting the cumulative distribution function.

        Token t of row b is the first token whose cumulative probability exceeds `noise[b, t]`. The
        randomness therefore belongs to the row: a response does not depend on the other prompts in
        its batch or on the worker that samples it.

        The prompt is encoded once, log-probabilities and values come from the same pass as the
        tokens, and finished rows leave the decoder's batch.

        Args:
            query_ids: [B, Q] int64 prompt tokens, padded on the right.
            query_mask: [B, Q] bool, True on prompt tokens.
            max_new_tokens: [B] int64, limit of each response in tokens, at least 1.
            noise: [B, R] float in [0, 1), with R at least the largest limit.

        Returns:
            A `Generation` whose R is the length of the longest response.

        Raises:
            NonFiniteError: a log-probability is NaN or infinite.
        """
        batch, width = len(query_ids), int(max_new_tokens.max())
        device = query_ids.device
        ids = torch.full((batch, width), self.pad_id, device=device)
        mask = torch.zeros((batch, width), dtype=torch.bool, device=device)
        logprobs = torch.zeros((batch, width), device=device)
        values = torch.zeros((batch, width), device=device)

        all_states = states = self.encode(query_ids, query_mask)
        active_query_mask = query_mask
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Output rows that are still in the decoder's batch, and which of those are unfinished.
        rows = torch.arange(batch, device=device)
        unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        start = last = torch.full((batch, 1), self.start_id, device=device)
        eos = torch.tensor(self.eos_ids, device=device)
        for t in range(width):
            logits, value = self._decode(states, active_query_mask, last, cache)
            history = last
            if self.constraints.needs_history:
                history = torch.cat([start[rows], ids[rows, :t]], dim=1)
            self.constraints.apply_(logits, history, max_new_tokens[rows], t)
            log_p = logits[:, -1].log_softmax(dim=-1)
            token = _invert_cdf(log_p, noise[rows, t])

            ids[rows, t] = torch.where(unfinished, token, self.pad_id)
            mask[rows, t] = unfinished
            logprobs[rows, t] = torch.where(unfinished, log_p.gather(1, token[:, None])[:, 0], 0.0)
            values[rows, t] = torch.where(unfinished, value[:, -1], 0.0)

            unfinished = unfinished & ~torch.isin(token, eos) & (max_new_tokens[rows] > t + 1)
            left = int(unfinished.sum())
            if left == 0:
                break
            last = token[:, None]
            if left < COMPACTION_THRESHOLD * len(rows):
                keep = unfinished.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, last, unfinished = rows[keep], last[keep], unfinished[keep]
                states, active_query_mask = states[keep], active_query_mask[keep]

        # Once per batch and not per token, because every such question waits for the GPU.
        if not logprobs.isfinite().all():
            raise NonFiniteError(
                "The policy's log-probabilities are not finite numbers, so it cannot sample. Check "
                "the weights of policy.model and policy.adapter for NaN; if they have none, set "
                "policy.dtype=float32."
            )
        longest = int(mask.sum(dim=1).max())
        return Generation(
            tokens=TokenBatch(
                query_ids=query_ids,
                query_mask=query_mask,
                response_ids=ids[:, :longest],
                response_mask=mask[:, :longest],
                encoder_states=all_states if self.frozen_encoder else None,
                limits=max_new_tokens if self.constraints.rules.forced_eos_ids else None,
            ),
            logprobs=logprobs[:, :longest],
            values=values[:, :longest],
        )

    def score_tokens(self, tokens: TokenBatch) -> TokenScores:
        """Compute log-probabilities and values of given responses in one teacher-forced pass.

        The decoder's input is the start token and the response shifted right by one, so its output
        at t is the distribution of response token t: the first token counts like any other.

        Args:
            tokens: B prompts and responses; its encoder states are used if it has any.
        """
        states = tokens.encoder_states
        if states is None:
            states = self.encode(tokens.query_ids, tokens.query_mask)
        response_ids, response_mask = tokens.response_ids, tokens.response_mask
        start = torch.full_like(response_ids[:, :1], self.start_id)
        decoder_ids = torch.cat([start, response_ids[:, :-1]], dim=1)
        logits, values = self._decode(
            states, tokens.query_mask, decoder_ids, query_ids=tokens.query_ids
        )
        self.constraints.apply_(logits, decoder_ids, tokens.limits)
        # cross_entropy is the negative log-probability and keeps no [B, R, V] log-softmax in memory.
        # The logits are flattened, because its kernel for a strided V is off by up to 1e-5 nats,
        # always with the same sign.
        logprobs = -nn.functional.cross_entropy(
            logits.flatten(0, 1), response_ids.flatten(), reduction="none"
        ).view_as(response_ids)
        return TokenScores(
            logprobs=torch.where(response_mask, logprobs, 0.0),
            values=torch.where(response_mask, values, 0.0),
        )

    @torch.no_grad()
    def values_after(self, tokens: TokenBatch) -> Tensor:
        """Estimate the value [B] after the last token of each response, float32.

        It is the value before the next token, which was not sampled; 0 without a value head.
        """
        lengths = tokens.response_mask.sum(dim=1, keepdim=True)
        ids = nn.functional.pad(tokens.response_ids, (0, 1), value=self.pad_id)
        mask = torch.arange(ids.shape[1], device=ids.device) <= lengths
        longer = replace(tokens, response_ids=ids, response_mask=mask)
        return self.score_tokens(longer).values.gather(1, lengths)[:, 0]

    @torch.no_grad()
    def ref_logprobs(self, tokens: TokenBatch) -> Tensor:
        """Compute log-probabilities [B, R] of given responses under the frozen reference."""
        with self.as_reference():
            return self.score_tokens(tokens).logprobs

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Make the policy behave as the reference, the model before any training, in this context."""
        if self._is_reference:
            yield
            return
        self._is_reference = True
        try:
            with self._reference_weights():
                yield
        finally:
            self._is_reference = False

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        if REFERENCE in self.model.peft_config:
            self.model.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield
            finally:
                self.model.set_adapter(POLICY)
        else:
            with self.model.disable_adapter():
                yield

    # ---- to and from disk --------------------------------------------------------------------

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in peft's format, which plain `peft` loads on the base model."""
        self.model.save_pretrained(str(folder), selected_adapters=[POLICY], safe_serialization=True)

    def load_adapter(self, folder: Path) -> None:
        """Load weights that `save_adapter` wrote into the trained adapter.

        Raises:
            ValueError: the weights belong to an adapter with other layers.
        """
        weights = load_file(folder / "adapter_model.safetensors")
        expected = get_peft_model_state_dict(self.model, adapter_name=POLICY)
        if weights.keys() != expected.keys():
            raise ValueError(
                f"The adapter in {folder} has other layers than the policy's adapter. Use the "
                "policy.lora_targets and policy.frozen_encoder that it was trained with."
            )
        set_peft_model_state_dict(self.model, weights, adapter_name=POLICY)

    def save_value_head(self, file: Path) -> None:
        """Write the value head as safetensors; without a critic there is no such file."""
        if self.value_head is not None:
            save_file({n: p.detach().cpu() for n, p in self.value_head.named_parameters()}, file)

    def load_value_head(self, file: Path) -> None:
        """Load the value head that `save_value_head` wrote, if the policy has one."""
        if self.value_head is not None:
            self.value_head.load_state_dict(load_file(file))


def _invert_cdf(log_p: Tensor, noise: Tensor) -> Tensor:
    """Sample tokens [B] from log_p [B, V] with one uniform number in [0, 1) per row, noise [B].

    A row with NaN gets the last token.
    """
    cumulative = log_p.exp().cumsum(dim=-1)
    total = cumulative[:, -1]
    # Kept strictly below the total, because rounding could otherwise select a token of probability
    # zero at the end.
    target = torch.minimum(
        noise.to(total.dtype) * total, torch.nextafter(total, total.new_zeros(()))
    )
    token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return token.clamp(max=log_p.shape[-1] - 1)
