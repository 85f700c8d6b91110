"""Every architecture that transformers maps for AutoModelForSeq2SeqLM, as small as it builds.

`python -m tests.family_table` prints for each whether a policy can be made of it or, if not, the
sentence with which `check` refuses it.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    BertConfig,
    EncoderDecoderConfig,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from ray_detox.config import ConfigError, DataConfig, PolicyConfig, RunConfig, SamplingConfig
from ray_detox.models.constraints import generation_rules
from ray_detox.models.trial import tiny_model
from ray_detox.stages.preflight import check_policy
from tests.conftest import save_word_tokenizer

FAMILIES = tuple(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
WORDS = tuple(f"w{i}" for i in range(60))
TARGETS = ("q", "v", "q_proj", "v_proj", "query", "value", "query_proj", "value_proj")
"""Names of the projections that get an adapter, in one family or another."""

STARTS_WITH_PAD = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pegasus", "marian")
"""Families whose decoder reads the pad token first; others start with `<s>` here."""


def family_config(family: str) -> PreTrainedConfig:
    """Return a family's default config, with the special tokens of this file's tokenizer."""
    if family == "encoder-decoder":
        parts = (BertConfig(), BertConfig(is_decoder=True, add_cross_attention=True))
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    else:
        config = AutoConfig.for_model(family)
    if config.is_encoder_decoder:
        start = 0 if family in STARTS_WITH_PAD else 3
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": start}
        for part in (config, config.get_text_config(decoder=True), *parts_of(config)):
            for name, value in ids.items():
                setattr(part, name, value)
    return config


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configs inside a config."""
    return [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]


def save_family(family: str, folder: Path) -> Path:
    """Save a small random model of a family, with a tokenizer of words, and return the folder."""
    torch.manual_seed(0)
    config = family_config(family)
    if config.is_encoder_decoder:
        generation = GenerationConfig.from_model_config(config)
        generation.forced_eos_token_id = None
        model = tiny_model(config, generation_rules(generation, config, SamplingConfig()))
        model.save_pretrained(folder)
    else:  # refused before its weights are looked at
        config.architectures = [MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[family]]
        config.save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")

    save_word_tokenizer(folder, (*SPECIAL, *WORDS))
    return folder


def targets_in(folder: Path) -> tuple[str, ...]:
    """Return those of TARGETS that name layers of a saved model."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        layers = {name.split(".")[-2] for name in weights.keys() if "." in name}  # noqa: SIM118
    return tuple(name for name in TARGETS if name in layers) or TARGETS[:2]


def refusal(folder: Path, **policy: Any) -> str | None:
    """Return the sentence with which `check` refuses a model, None if it accepts it."""
    settings: dict[str, Any] = {
        "model": str(folder),
        "lora_targets": targets_in(folder),
        "lora_rank": 4,
    }
    try:
        check_policy(
            RunConfig(
                policy=PolicyConfig(**(settings | policy)),
                data=DataConfig(max_prompt_tokens=12),
                sampling=SamplingConfig(max_new_tokens=12),
            )
        )
    except ConfigError as error:
        return str(error)
    return None


def main() -> None:
    """Print one line per architecture."""
    with tempfile.TemporaryDirectory() as root:
        for family in FAMILIES:
            folder = save_family(family, Path(root) / family)
            sentence = refusal(folder)
            verdict = "works" if sentence is None else "refused: " + sentence
            print(f"{family:24} {verdict.replace(str(folder), family)}", flush=True)


if __name__ == "__main__":
    main()
