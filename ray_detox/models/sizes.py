"""Compare the size of a model that a config.json describes with the weights in its files.

transformers fills weights that no file has with random numbers, so a config.json alone could ask for
more memory than any machine has.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

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
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    there, tensors = 0, 0
    for file in files:
        try:
            with safe_open(str(file), "np") as weights:
                for key in list(weights.keys()):
                    tensors += 1
                    there += torch.Size(weights.get_slice(key).get_shape()).numel()
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{setting} is {name!r}, and its {file.name} cannot be read: {first_line(error)}. "
                "Copy the model again."
            ) from None
    described = sum(one.numel() for one in [*model.parameters(), *model.buffers()])
    deep = len([*model.parameters()])
    # Twice: a weight that two layers share is once in a file, and may be counted for both.
    if described > 2 * there + SPARE or deep > 2 * tensors:
        raise ConfigError(
            f"{setting} is {name!r}, whose config.json describes a model of {described:,} numbers in "
            f"{deep:,} weights, and its files have {there:,} in {tensors:,}. Correct the sizes in "
            "config.json, or copy the model again."
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
