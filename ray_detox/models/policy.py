"""The policy: an encoder-decoder with a LoRA adapter and a value head.

It samples answers, scores tokens, and is its own reference: the same weights with the adapter
off (or, where training starts from an adapter, with a frozen copy of that adapter on), so no
second model is kept. It knows nothing of rewards, of PPO or of Ray.

The model stays in eval() although it is trained: dropout would change log-probabilities between
sampling and update, and the very first ratio would no longer be 1. Gradients flow all the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from ray_detox.records import Generation

# Weight-loading bars and tying notices of the library would drown our own lines.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

REFERENCE = "reference"
POLICY = "default"

COMPACT_BELOW = 0.75
"""Finished rows are dropped from the decoder's batch once fewer than this share are still going:
dropping copies the cache, so it must save more than it costs."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the policy thinks of given tokens; every tensor is [B, R] float32."""

    logprobs: Tensor
    values: Tensor


class Policy(nn.Module):
    """A sequence-to-sequence model that can be sampled, scored and trained.

    Args:
        model: the peft model, adapter "default" being trained; a frozen adapter "reference" may
            be beside it, otherwise the reference is the model with the adapter off.
        sampling: temperature and barred end-of-sequence positions; part of the distribution, so
            sampling and scoring always agree on it.
        frozen_encoder: True where no encoder layer has an adapter.
        dtype: arithmetic of the forward passes; adapter, value head and losses stay float32.
    """

    def __init__(
        self,
        model: PeftModel,
        sampling: SamplingConfig,
        frozen_encoder: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.sampling = sampling
        self.frozen_encoder = frozen_encoder
        self.dtype = dtype
        self.value_head = nn.Linear(config.hidden_size, 1)
        # Zero: the first values are 0, a neutral guess that no seed decides.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.pad_id: int = config.pad_token_id
        eos = config.eos_token_id
        self.eos_ids: list[int] = list(eos) if isinstance(eos, list | tuple) else [eos]
        self.start_id: int = config.decoder_start_token_id
        self._hidden: Tensor | None = None
        self._is_reference = False
        base = model.get_base_model()
        # The value head reads the decoder's last hidden state. A hook hands it over, because the
        # alternative, output_hidden_states, keeps every layer's.
        base.get_decoder().register_forward_hook(self._keep_hidden)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where sampled tensors will be."""
        return self.value_head.weight.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Adapter and value head by name, in an order that never changes."""
        return {n: p for n, p in sorted(self.named_parameters()) if p.requires_grad}

    # ---- forward passes ----------------------------------------------------------------------

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden = output[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def encode(self, query_ids: Tensor, query_mask: Tensor) -> Tensor:
        """Encoder states [B, Q, D] of right-padded prompts [B, Q]."""
        encoder = self.model.get_base_model().get_encoder()
        # A frozen encoder gets no gradient; not building its graph saves its activations.
        with (
            self._autocast(),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder),
        ):
            states: Tensor = encoder(input_ids=query_ids, attention_mask=query_mask.long())[0]
        return states

    def _decode(
        self, states: Tensor, query_mask: Tensor, decoder_ids: Tensor, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, R, V] of the distribution that is sampled, and values [B, R], both float32."""
        with self._autocast():
            output = self.model.get_base_model()(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=query_mask.long(),
                decoder_input_ids=decoder_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        assert self._hidden is not None, "the decoder ran, so its hook has kept the hidden state"
        values = self.value_head(self._hidden.float()).squeeze(-1)
        self._hidden = None
        logits = output.logits.float()
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        return logits, values

    def _bar_eos(self, logits: Tensor, first_position: int) -> Tensor:
        """Bar end-of-sequence where the response is too short to end. Logits are [B, R, V]."""
        barred = self.sampling.min_new_tokens - first_position
        if barred <= 0:
            return logits
        logits = logits.clone()
        logits[:, :barred, self.eos_ids] = torch.finfo(logits.dtype).min
        return logits

    @torch.no_grad()
    def sample(
        self, query_ids: Tensor, query_mask: Tensor, max_new_tokens: Tensor, noise: Tensor
    ) -> Generation:
        """Answer prompts, one draw per token by inverting the distribution function.

        Token t of row b is the first whose cumulative probability exceeds `noise[b, t]`. The
        randomness therefore belongs to the row, and a response does not depend on which other
        prompts shared its batch or which worker drew it.

        The prompt is encoded once, log-probabilities and values come out of the same pass as the
        tokens, and rows that have ended leave the batch.

        Args:
            query_ids: [B, Q] int64 prompt tokens, padded on the right.
            query_mask: [B, Q] bool.
            max_new_tokens: [B] int64, the most tokens each response may have, at least 1.
            noise: [B, R] float, in [0, 1), R at least the largest limit.

        Returns:
            A `Generation` as wide as the longest response.
        """
        batch, width = len(query_ids), int(max_new_tokens.max())
        device = query_ids.device
        ids = torch.full((batch, width), self.pad_id, device=device)
        mask = torch.zeros((batch, width), dtype=torch.bool, device=device)
        logprobs = torch.zeros((batch, width), device=device)
        values = torch.zeros((batch, width), device=device)

        all_states = states = self.encode(query_ids, query_mask)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        rows = torch.arange(batch, device=device)  # rows of the output that are in the decoder
        going = torch.ones(batch, dtype=torch.bool, device=device)  # of those, not yet ended
        last = torch.full((batch, 1), self.start_id, device=device)
        eos = torch.tensor(self.eos_ids, device=device)
        for t in range(width):
            logits, value = self._decode(states, query_mask, last, cache)
            log_p = self._bar_eos(logits, t)[:, -1].log_softmax(dim=-1)
            token = _invert_cdf(log_p, noise[rows, t])

            ids[rows, t] = torch.where(going, token, self.pad_id)
            mask[rows, t] = going
            logprobs[rows, t] = torch.where(going, log_p.gather(1, token[:, None])[:, 0], 0.0)
            values[rows, t] = torch.where(going, value[:, -1], 0.0)

            going = going & ~torch.isin(token, eos) & (max_new_tokens[rows] > t + 1)
            left = int(going.sum())
            if left == 0:
                break
            last = token[:, None]
            if left < COMPACT_BELOW * len(rows):
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, last, going = rows[keep], last[keep], going[keep]
                states, query_mask = states[keep], query_mask[keep]

        longest = int(mask.sum(dim=1).max())
        return Generation(
            response_ids=ids[:, :longest],
            response_mask=mask[:, :longest],
            logprobs=logprobs[:, :longest],
            values=values[:, :longest],
            encoder_states=all_states if self.frozen_encoder else None,
        )

    def score_tokens(
        self,
        query_ids: Tensor,
        query_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        encoder_states: Tensor | None = None,
    ) -> TokenScores:
        """Log-probabilities and values of given responses, in one teacher-forced pass.

        The decoder reads the start token and the response shifted right by one, so its output at
        t is the distribution of response token t: the first token counts like any other.

        Args:
            query_ids, query_mask: [B, Q].
            response_ids, response_mask: [B, R].
            encoder_states: [B, Q, D] from an earlier pass over the same prompts, else None.
        """
        if encoder_states is None:
            encoder_states = self.encode(query_ids, query_mask)
        start = torch.full_like(response_ids[:, :1], self.start_id)
        decoder_ids = torch.cat([start, response_ids[:, :-1]], dim=1)
        logits, values = self._decode(encoder_states, query_mask, decoder_ids)
        logits = self._bar_eos(logits, 0)
        # cross_entropy is the negative log-probability without a [B, R, V] log-softmax kept for it.
        # Flat, because its kernel for a strided V is off by 1e-5 nats, always to the same side.
        logprobs = -nn.functional.cross_entropy(
            logits.flatten(0, 1), response_ids.flatten(), reduction="none"
        ).view_as(response_ids)
        return TokenScores(
            logprobs=torch.where(response_mask, logprobs, 0.0),
            values=torch.where(response_mask, values, 0.0),
        )

    @torch.no_grad()
    def ref_logprobs(
        self,
        query_ids: Tensor,
        query_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        encoder_states: Tensor | None = None,
    ) -> Tensor:
        """[B, R] log-probabilities of the same tokens under the frozen reference."""
        with self.as_reference():
            return self.score_tokens(
                query_ids, query_mask, response_ids, response_mask, encoder_states
            ).logprobs

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the policy behaves as the reference: the model before any training."""
        if self._is_reference:
            yield
            return
        self._is_reference = True
        try:
            with self._switched():
                yield
        finally:
            self._is_reference = False

    @contextmanager
    def _switched(self) -> Iterator[None]:
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
        """Write the adapter as peft safetensors, which plain `peft` loads on the base model."""
        self.model.save_pretrained(str(folder), selected_adapters=[POLICY], safe_serialization=True)

    def load_adapter(self, folder: Path) -> None:
        """Read weights that `save_adapter` wrote, into the adapter that is trained."""
        weights = load_file(folder / "adapter_model.safetensors")
        expected = get_peft_model_state_dict(self.model, adapter_name=POLICY)
        if weights.keys() != expected.keys():
            raise ValueError(f"The adapter in {folder} is of another shape than the policy's.")
        set_peft_model_state_dict(self.model, weights, adapter_name=POLICY)

    def save_value_head(self, file: Path) -> None:
        """Write the value head as safetensors."""
        save_file({n: p.detach().cpu() for n, p in self.value_head.named_parameters()}, file)

    def load_value_head(self, file: Path) -> None:
        """Read what `save_value_head` wrote."""
        self.value_head.load_state_dict(load_file(file))


def _invert_cdf(log_p: Tensor, noise: Tensor) -> Tensor:
    """Tokens [B] drawn from log_p [B, V] with one uniform number per row [B]."""
    cumulative = log_p.exp().cumsum(dim=-1)
    total = cumulative[:, -1]
    # Strictly below the total, or rounding could pick a token past the end, of probability zero.
    target = torch.minimum(
        noise.to(total.dtype) * total, torch.nextafter(total, total.new_zeros(()))
    )
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


# ---- making one --------------------------------------------------------------------------------
