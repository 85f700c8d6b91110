"""The output head of a sequence-to-sequence model: the layer that turns states into logits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ray_detox.errors import ConfigError


def find_head(base: PreTrainedModel) -> nn.Module:
    """Return the layer that computes the logits; an adapter may wrap it.

    Raises:
        ConfigError: the model has none.
    """
    output = base.get_output_embeddings()
    if isinstance(output, nn.Embedding):
        # FSMT names the embedding of the words that its output projection, in the decoder, predicts.
        shape = output.weight.shape
        linear = (m for m in base.get_decoder().modules() if isinstance(m, nn.Linear))
        output = next((m for m in linear if m.weight.shape == shape), None)
    if output is None:
        raise ConfigError(
            f"policy.model is a {type(base).__name__}, which has no layer that computes logits; "
            "expected an encoder-decoder language model such as google/flan-t5-base."
        )
    return output


def head_width(head: nn.Module) -> int:
    """Return the width D of the states that the head reads."""
    weight: Any = head.weight
    return int(weight.shape[1])


def vocabulary_size(head: nn.Module) -> int:
    """Return the number V of logits that the head computes for a state."""
    weight: Any = head.weight
    return int(weight.shape[0])


def run_in_float32(head: nn.Module) -> None:
    """Make the head compute in float32 whatever arrives, also under autocast.

    A logit of 16 to 32 has a spacing of 0.125 in bfloat16, and rounding it is most of the difference
    between sampled and teacher-forced log-probabilities. A head that shares its weight with the
    embedding gets a copy in float32; both are frozen, so they stay equal.
    """
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                wide = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                setattr(layer, name, wide)
    forward = head.forward

    def forward_in_float32(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(states.device.type, enabled=False):
            return forward(states.float(), *args, **kwargs)

    head.forward = forward_in_float32
