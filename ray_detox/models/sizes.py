"""Compare a model that a config.json describes with the weights in its files: sizes, names, shapes.

transformers fills weights that no file has with random numbers, so a config.json alone could ask for
more memory than any machine has.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from ray_detox.bounded import DamagedError, parse_object, read_file
from ray_detox.errors import ConfigError, first_line

SPARE = 1 << 24
"""Numbers that a model may compute instead of reading them, such as positions."""


def check_size(model: Any, folder: Path, name: str, setting: str) -> None:
    """Check that a model is about as large as its files; without weights in the folder, do nothing.

    Args:
        model: built on the meta device.
        folder: of the model.
        name: of the model, for messages.
        setting: the setting that names it, for messages.

    Raises:
        ConfigError: it is larger, or a file is damaged.
    """
    files = weight_files(folder, name, setting)
    if not files:
        return
    there, tensors = 0, 0
    keys = set[str]()
    for file in files:
        try:
            with safe_open(str(file), "np") as weights:
                for key in list(weights.keys()):
                    tensors += 1
                    keys.add(key)
                    there += torch.Size(weights.get_slice(key).get_shape()).numel()
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{setting} is {name!r}, and its {file.name} cannot be read: {first_line(error)}. "
                "Copy the model again."
            ) from None
    _check_prefix(model, keys, name, setting)
    described = sum(one.numel() for one in [*model.parameters(), *model.buffers()])
    deep = len([*model.parameters()])
    # Twice: a weight that two layers share is once in a file, and may be counted for both.
    if described > 2 * there + SPARE or deep > 2 * tensors:
        raise ConfigError(
            f"{setting} is {name!r}, whose config.json describes a model of {described:,} numbers in "
            f"{deep:,} weights, and its files have {there:,} in {tensors:,}. Correct the sizes in "
            "config.json, or copy the model again."
        )


def _check_prefix(model: Any, keys: set[str], name: str, setting: str) -> None:
    """Check that the names of weights begin as the model's, as far as a wrapper changes all of them.

    transformers itself adds or removes the prefix of the base model. Other single names may differ:
    those that are not in the files after all are found when the weights are loaded.
    """
    own = {parameter for parameter, _ in model.named_parameters()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = own | {f"{prefix}{one}" for one in own} | {one.removeprefix(prefix) for one in own}
    if not own or known & keys:
        return
    wrapped = next((k for k in sorted(keys) if any(k.endswith(f".{one}") for one in own)), None)
    if wrapped is not None or not any(k.rpartition(".")[2] in ("weight", "bias") for k in keys):
        found = wrapped or min(keys, default="nothing")
        raise ConfigError(
            f"{setting} is {name!r}, whose files name their weights otherwise than the model (such as "
            f"{found}; expected {min(own)}), so all would be random. Save the model again with "
            "save_pretrained of its own class, without a wrapper."
        )
    check_names(own, name, setting)


def weight_files(folder: Path, name: str, setting: str) -> list[Path]:
    """Return the files from which transformers loads a model's weights; none without safetensors.

    Args:
        folder: of the model.
        name: of the model, for messages.
        setting: the setting that names it, for messages.

    Raises:
        ConfigError: there are safetensors files, but not those that transformers would load.
    """
    found = sorted(folder.glob("*.safetensors"))
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not found or whole in found:
        return [whole] if found else []
    if not index.is_file():
        raise ConfigError(
            f"{setting} is {name!r}, and its weights are in {found[0].name}, but transformers loads "
            f"{whole.name}, or the parts that {index.name} lists. Rename a file with all weights to "
            f"{whole.name}; for parts, copy {index.name} as well."
        )
    try:
        weights = parse_object(read_file(index)).get("weight_map")
    except DamagedError as error:
        raise ConfigError(
            f"{setting} is {name!r}, and its {index.name} is damaged: {error}. Copy the model again."
        ) from None
    files = sorted(set(map(str, weights.values())) if isinstance(weights, dict) else set())
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ConfigError(
            f"{setting} is {name!r}, and {len(absent)} of the {len(files)} files with its weights "
            f"are missing, such as {absent[0]}. Copy or download the model again."
        )
    return [folder / file for file in files]


def check_weights(auto: Any, folder: Path, name: str, setting: str) -> None:
    """Check names and shapes of all weights as transformers does when it loads them, but load none.

    Args:
        auto: class such as `AutoModelForSeq2SeqLM`.
        folder: of the model; without weights in it, do nothing.
        name: of the model, for messages.
        setting: the setting that names it, for messages.

    Raises:
        ConfigError: some are missing, or have another shape.
    """
    if not weight_files(folder, name, setting):
        return
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        _, info = auto.from_pretrained(
            folder,
            device_map={"": "meta"},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception:  # some classes fail on the meta device; loading them says why
        return
    check_loaded(info, name, setting)


def check_loaded(info: dict[str, Any], name: str, setting: str) -> None:
    """Check that a model's weights were all in its files, in their shapes.

    Args:
        info: from `from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True)`.
        name: of the model, for messages.
        setting: the setting that names it, for messages.

    Raises:
        ConfigError: some were not.
    """
    if info["mismatched_keys"]:
        key, found, expected = min(info["mismatched_keys"])
        raise ConfigError(
            f"{setting} is {name!r}, and its weights do not fit its config.json: {key} has shape "
            f"{tuple(found)}, and config.json (labels, sizes) describes {tuple(expected)}. Correct "
            "config.json."
        )
    check_names(info["missing_keys"], name, setting)


def check_names(missing: Iterable[str], name: str, setting: str) -> None:
    """Check that the files had every weight; transformers would fill the others with random numbers.

    Args:
        missing: weights of the model that no file has, as transformers reports them.
        name: of the model, for messages.
        setting: the setting that names it, for messages.

    Raises:
        ConfigError: some are missing.
    """
    absent = sorted(missing)
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        if setting.startswith("policy."):
            remedy = (
                "Save the model again with save_pretrained of its own class, without a wrapper."
            )
        else:
            remedy = "Set it to a model that was trained and saved as a sequence classifier."
        raise ConfigError(
            f"{setting} is {name!r}, and its files have no weights for {absent[0]}{more}, so they would be "
            f"random. {remedy}"
        )


def check_size_of(auto: Any, folder: Path, name: str, setting: str) -> None:
    """Build a model on the meta device, and check it; see `check_size`.

    Args:
        auto: class such as `AutoModelForSeq2SeqLM`.
        folder: of the model.
        name: of the model, for messages.
        setting: the setting that names it, for messages.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
    check_size(model, folder, name, setting)
