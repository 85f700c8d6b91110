"""LoRA adapters that a policy can train: what their settings may say, and which layers they may adapt.

The reference of a policy is its base model with the adapter off, or with a frozen copy of the
starting adapter on. That needs base weights that no adapter changes, and layers of their own.
"""

from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ray_detox.errors import ConfigError

INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base weights as they are."""


def check_adapter_settings(settings: LoraConfig, name: str) -> None:
    """Check that a starting adapter adds to the base model and changes nothing else.

    Args:
        settings: from the adapter's folder.
        name: value of `policy.adapter`, for messages.

    Raises:
        ConfigError: it changes base weights, or the base model's structure.
    """
    reason = None
    if settings.init_lora_weights not in INITIALISATIONS:
        reason = (
            f"it was initialised with {settings.init_lora_weights}, which changes the base weights. "
            "Save it as a plain LoRA: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)"
        )
    elif settings.bias != "none":
        reason = (
            f"it also trains biases of the base model (bias={settings.bias}), so the reference would "
            "change with it. Train the adapter with bias=none"
        )
    elif settings.layer_replication:
        reason = (
            "it replicates layers of the base model (layer_replication), which an adapter that is "
            "off cannot undo. Use an adapter without it"
        )
    elif settings.trainable_token_indices:
        reason = (
            "it trains single rows of the embedding (trainable_token_indices), which is not "
            "supported. Use an adapter of linear layers"
        )
    if reason is not None:
        raise ConfigError(f"policy.adapter is {name!r}, and {reason}.")


def is_shared(model: nn.Module, weight: Any) -> bool:
    """Return whether more than one layer of a model uses a weight."""
    return sum(p is weight for m in model.modules() for p in m.parameters(recurse=False)) > 1


def shared_layers(model: nn.Module) -> list[str]:
    """Return the names of adapted layers whose base weight another layer uses as well.

    A head tied to the embedding is one: merging its adapter would change the embedding too.
    """
    found = []
    for name, module in model.named_modules():
        layer: Any = None
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            layer = module.original_module
        if layer is not None and is_shared(model, getattr(layer, "weight", None)):
            found.append(name.removeprefix("base_model.model."))
    return found


def check_not_shared(model: nn.Module, setting: str, name: str) -> None:
    """Check that no adapted layer shares its weight, as a head tied to the embedding does.

    Args:
        model: with the adapter.
        setting: setting that chose the layers, for messages.
        name: its value.

    Raises:
        ConfigError: a layer shares its weight.
    """
    shared = shared_layers(model)
    if shared:
        raise ConfigError(
            f"{setting} is {name}, and it adapts {shared[0]}, whose weight the model uses in "
            "another place too, so the adapter could not be merged into it. Leave this layer out."
        )
