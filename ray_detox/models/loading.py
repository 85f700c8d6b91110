"""Load a policy from a base model and an adapter, and export the merged model."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.errors import ConfigError, first_line
from ray_detox.models.adapters import (
    check_adapter_settings,
    check_not_shared,
    check_patterns,
    is_shared,
    read_adapter,
)
from ray_detox.models.constraints import forced_bos_id
from ray_detox.models.critic import make_value_head
from ray_detox.models.output_head import find_head, head_width
from ray_detox.models.policy import POLICY, REFERENCE, Policy
from ray_detox.models.sizes import check_loaded, check_size_of
from ray_detox.models.sources import local_folder


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `policy.dtype` means on a device.

    float16 is never used: the activations of T5 overflow it.
    """
    if name == "auto":
        # Not emulated: float32 is then faster as well as more precise.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if native else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def lora_config(config: PolicyConfig) -> LoraConfig:
    """Return peft's settings for the adapter that `config` describes."""
    targets: list[str] | str = list(config.lora_targets)
    if config.frozen_encoder:
        # peft interprets a string as a regular expression for whole module names.
        targets = rf".*\bdecoder\b.*\.({'|'.join(config.lora_targets)})"
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type=TaskType.SEQ_2_SEQ_LM,
    )


@contextmanager
def quiet_deprecations() -> Iterator[None]:
    """Suppress warnings about a library's use of another one, such as peft's of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_policy(
    config: PolicyConfig,
    sampling: SamplingConfig,
    seed: int,
    device: torch.device | str = "cpu",
    critic: Literal["none", "detached", "shared"] = "none",
) -> Policy:
    """Load the base model, attach the adapter and, to train with a critic, add a value head.

    New weights depend on `seed` alone, so that all workers start from the same weights.

    Raises:
        ConfigError: the model or the starting adapter does not exist, or they do not fit a policy.
    """
    device = torch.device(device)
    dtype = compute_dtype(config.dtype, device)
    folder = local_folder(config.model, config.revision, "policy.model")
    check_size_of(AutoModelForSeq2SeqLM, folder, config.model, "policy.model")
    base, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the shapes
        trust_remote_code=False,
    )
    check_loaded(info, config.model, "policy.model")
    base.requires_grad_(False)
    if config.adapter is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with quiet_deprecations():
                model = get_peft_model(base, lora_config(config))
    else:
        start = str(local_folder(config.adapter, None, "policy.adapter"))
        read_adapter(Path(start), config.adapter)
        settings = LoraConfig.from_pretrained(start)
        check_adapter_settings(settings, config.adapter)
        check_patterns(settings, base, config.adapter)
        with quiet_deprecations():
            model = PeftModel.from_pretrained(base, start, adapter_name=POLICY, is_trainable=True)
        # The reference is the starting adapter and not the base model: otherwise the first step's
        # KL would already contain everything that the starting adapter has learned.
        model.load_adapter(start, adapter_name=REFERENCE, is_trainable=False)
        model.set_adapter(POLICY)
    if config.adapter is None:
        check_not_shared(model, "policy.lora_targets", f"[{', '.join(config.lora_targets)}]")
    else:
        check_not_shared(model, "policy.adapter", repr(config.adapter))
    # Plain peft loads the base model by this name, so it must not be a cache folder of this machine.
    model.peft_config[POLICY].base_model_name_or_path = (
        str(folder) if config.model == "lab" else config.model
    )
    forced = None
    if config.forced_bos_token is not None:
        forced = forced_bos_id(
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False), config
        )
    return build_policy(model, sampling, dtype, forced, critic, seed).to(device)


def build_policy(
    model: PeftModel,
    sampling: SamplingConfig,
    dtype: torch.dtype = torch.float32,
    forced_bos_id: int | None = None,
    critic: Literal["none", "detached", "shared"] = "none",
    seed: int = 0,
) -> Policy:
    """Make a policy of a model with an adapter; its encoder is frozen if the adapter does not train it."""
    base = model.get_base_model()
    is_trained = any(parameter.requires_grad for parameter in base.get_encoder().parameters())
    value_head = make_value_head(critic, head_width(find_head(base)), seed)
    return Policy(model, sampling, not is_trained, dtype, forced_bos_id, value_head)


def export_model(config: PolicyConfig, adapter: Path, out: Path) -> None:
    """Merge an adapter into its base model and save a plain model that needs no peft.

    Args:
        config: settings that name the base model.
        adapter: folder that `Policy.save_adapter` wrote.
        out: folder for model and tokenizer.
    """
    folder = local_folder(config.model, config.revision, "policy.model")
    check_size_of(AutoModelForSeq2SeqLM, folder, config.model, "policy.model")
    base = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    ties = getattr(base.config, "tie_word_embeddings", None)
    merged = _merge(base, str(adapter), config.model)
    head_is_tied = is_shared(merged, find_head(merged).weight)
    if head_is_tied and ties is not None:
        # peft compares head and encoder embedding, and takes the head of T5Gemma, which is tied to
        # the decoder's, for untied.
        merged.config.tie_word_embeddings = ties
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if config.forced_bos_token is not None:  # `generate` then starts as the policy does
        merged.generation_config.forced_bos_token_id = forced_bos_id(tokenizer, config)
    merged.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    if not head_is_tied:
        # transformers 5 writes true for every T5, tied or not. Version 4 would believe it, tie the
        # head and compute other logits without an error.
        _change_settings(out / "config.json", {"tie_word_embeddings": False})
    _suit_version_4(out / "tokenizer_config.json")


def _suit_version_4(file: Path) -> None:
    """Change the settings of a tokenizer that transformers 5 wrote so that version 4 loads it as well."""
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {}
    if settings.get("tokenizer_class") == "TokenizersBackend":  # version 4 does not know it
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # version 4 expects them by name
        changes["additional_special_tokens"] = settings["extra_special_tokens"]
        changes["extra_special_tokens"] = None
    # How this process found the tokenizer is no property of it.
    _change_settings(file, {**changes, "is_local": None, "local_files_only": None})


def _change_settings(file: Path, changes: Mapping[str, Any]) -> None:
    """Change values of a JSON file; None removes one."""
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {
        name: value for name, value in settings.items() if name not in changes or value is not None
    }
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merge(base: Any, adapter: str, name: str) -> Any:
    """Return a base model with an adapter merged into it.

    Args:
        base: is changed.
        adapter: folder, which may come from elsewhere.
        name: of the base model, for messages.

    Raises:
        ConfigError: the adapter is not valid, or does not fit.
    """
    read_adapter(Path(adapter), adapter)
    try:
        settings = LoraConfig.from_pretrained(adapter)
        check_adapter_settings(settings, adapter)
        check_patterns(settings, base, adapter)
        with warnings.catch_warnings():
            # Warnings that do not concern the user: peft's on untied embeddings, although this head
            # was never tied, and deprecations inside the libraries.
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(base, adapter).merge_and_unload()
    except ConfigError:
        raise
    except Exception as error:  # of any kind, for values that peft does not expect
        raise ConfigError(
            f"The adapter of the run cannot be merged into {name!r}: {first_line(error)}. Train it again, "
            "or take another checkpoint of the run with --checkpoint."
        ) from error
