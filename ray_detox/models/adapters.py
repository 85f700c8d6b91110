"""LoRA adapters that a policy can train: what their settings may say, and which layers they may adapt.

The reference of a policy is its base model with the adapter off, or with a frozen copy of the
starting adapter on. That needs base weights that no adapter changes, and layers of their own.
"""

import json
import math
import re
import reprlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ray_detox.bounded import DamagedError, parse_object, read_file
from ray_detox.errors import ConfigError

INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave the base weights as they are."""
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "kasa_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of peft for other methods than LoRA: they import packages, read more files,
recurse without end, or cannot be merged into the model."""
MAX_RANK = 4_096
MAX_PATTERN_CHARACTERS = 20_000
"""Maximum length of all regular expressions of an adapter together."""
PATTERN_TIMEOUT_S = 10.0
"""Longest time that matching an adapter's regular expressions with a model's layers may take."""

# The forms in which peft uses them.
_MATCH = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    for one in patterns:
        forms = one, rf"(.*\.)?({one})$", rf"(^|.*\.){one}($|\..*)", rf"(?:^|.*?\.){one}\.(\d+)\."
        for form in map(re.compile, forms):
            for name in names:
                form.match(name), form.fullmatch(name)
except Exception as error:
    print(str(error) or type(error).__name__)
"""


def read_adapter(folder: Path, name: str) -> None:
    """Check the adapter_config.json of a LoRA before peft reads it: kinds of values, and sizes.

    Args:
        folder: of the adapter.
        name: of the adapter, for messages.

    Raises:
        ConfigError: a value is not valid.
    """
    try:
        settings = parse_object(read_file(folder / "adapter_config.json"))
    except DamagedError as error:
        raise ConfigError(
            f"policy.adapter is {name!r}, and its adapter_config.json is damaged: {error}."
        ) from None
    ranks, alphas = settings.get("rank_pattern"), settings.get("alpha_pattern")
    checks = [
        ("r", _is_rank(settings.get("r", 1)), f"a whole number from 1 to {MAX_RANK}"),
        (
            "base_model_name_or_path",
            isinstance(settings.get("base_model_name_or_path"), str | None),
            "a name",
        ),
        ("lora_alpha", _is_number(settings.get("lora_alpha", 1)), "a number"),
        ("lora_dropout", _is_number(settings.get("lora_dropout", 0)), "a number"),
        (
            "rank_pattern",
            ranks is None or (isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))),
            f"names with whole numbers from 1 to {MAX_RANK}",
        ),
        (
            "alpha_pattern",
            alphas is None or (isinstance(alphas, dict) and all(map(_is_number, alphas.values()))),
            "names with numbers",
        ),
        *(
            (key, _are_names(settings.get(key)), "a name or a list of names")
            for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
        ),
        *((key, not settings.get(key), "nothing: only LoRA is supported") for key in UNSUPPORTED),
    ]
    for key, is_valid, expected in checks:
        if not is_valid:
            raise ConfigError(
                f"policy.adapter is {name!r}, and its adapter_config.json has "
                f"{key}={reprlib.repr(settings[key])}; expected {expected}."
            )


def check_patterns(settings: LoraConfig, model: nn.Module, name: str) -> None:
    """Check that the regular expressions by which an adapter names its layers can be matched.

    In a child process, because some expressions take years, and Python cannot interrupt a match.

    Args:
        settings: from the adapter's folder.
        model: the base model.
        name: of the adapter, for messages.

    Raises:
        ConfigError: one is not valid, or takes too long.
    """
    fields = (
        settings.target_modules,
        settings.exclude_modules,
        settings.modules_to_save,
        settings.layers_pattern,
        settings.rank_pattern,
        settings.alpha_pattern,
    )
    patterns = [
        one for field in fields for one in ([field] if isinstance(field, str) else field or ())
    ]
    special = [one for one in patterns if not re.fullmatch(r"[\w.]*", one)]
    if not special:
        return
    reason = ""
    if sum(map(len, special)) > MAX_PATTERN_CHARACTERS:
        reason = f"they have more than {MAX_PATTERN_CHARACTERS:,} characters"
    else:
        names = [name for name, _ in model.named_modules()]
        try:
            reason = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _MATCH],
                input=json.dumps([special, names]),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=PATTERN_TIMEOUT_S,
            ).stdout.strip()
        except subprocess.TimeoutExpired:
            reason = f"matching them takes longer than {PATTERN_TIMEOUT_S:g} s"
    if reason:
        raise ConfigError(
            f"policy.adapter is {name!r}, and the regular expressions of its adapter_config.json cannot "
            f"be used, such as {special[0][:60]!r}: {reason}. Name the layers in a list."
        )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_names(value: Any) -> bool:
    names: Iterable[Any] = value if isinstance(value, list) else ()
    return value is None or (
        isinstance(value, str | list) and all(isinstance(n, str) for n in names)
    )


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
    return _uses(model)[id(weight)] > 1


def _uses(model: nn.Module) -> Counter[int]:
    """Return the number of layers that use each weight, by its `id`."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


def shared_layers(model: nn.Module) -> list[str]:
    """Return the names of adapted layers whose base weight another layer uses as well.

    A head tied to the embedding is one: merging its adapter would change the embedding too.
    """
    found, uses = [], _uses(model)
    for name, module in model.named_modules():
        layer: Any = None
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            layer = module.original_module
        if layer is not None and uses[id(getattr(layer, "weight", None))] > 1:
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
