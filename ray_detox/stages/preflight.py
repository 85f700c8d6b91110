"""Checks before a run starts: files, model configs, labels, adapters, storage and output folder.

`config.py` checks what the settings alone can tell. These checks read files as well, but no weights,
and they do not start Ray.
"""

import json
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray_detox.bounded import DamagedError, parse_object, read_file, read_if_there
from ray_detox.config import ClassifierConfig, ConfigError, PolicyConfig, RunConfig
from ray_detox.data.files import Source, check_rows, locate, peek
from ray_detox.data.prompts import prompt_text, reason_to_leave_out
from ray_detox.errors import first_line
from ray_detox.evaluation.judges import check_judge
from ray_detox.lab import corpus
from ray_detox.models.sources import (
    hub_has_safetensors,
    is_hub_offline,
    local_folder,
    looks_like_path,
)
from ray_detox.resources import Bundle, Node, needs, shortfall
from ray_detox.runs.storage import check_storage, reason_disk_full, reason_not_writable

VOCABULARIES = (
    "tokenizer.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "vocab*.json",
    "vocab.txt",
    "byte_maps.json",
)
"""Files that may hold the vocabulary of a tokenizer."""
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.h5", "*.msgpack", "*.gguf")
"""Files of weights that are not read."""
WITHOUT_VOCABULARY = frozenset({"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"})
"""Tokenizers of bytes or characters, which have no vocabulary."""
MOST_WEIGHTS_TO_TRY = 1 << 30
"""Bytes of reward models up to which a check tries them on sentences; above it, the actors do."""
TOXIC_NAMES = frozenset(
    "hate hateful hatespeech hate_speech hate-speech insult obscene offensive toxic toxicity "
    "severe_toxic threat identity_hate abusive abuse nsfw".split()
)
"""Labels that almost certainly mean toxic."""


def check(config: RunConfig, *, functions: bool = True) -> Source:
    """Check everything that the settings name; downloads configs from the hub or S3, not weights.

    Args:
        config: of the run.
        functions: import the reward functions and try them.

    Returns:
        The source of the prompts.

    Raises:
        ConfigError: a setting is not valid; the message names the first one and its fix.
    """
    check_judge(config.evaluate.judge)
    source = locate(config.data)
    check_rows(source, config.data)
    check_policy(config)
    check_reward(config, source, functions=functions)
    if config.train.storage is not None:
        check_storage(config.train.storage)
    return source


def check_without_fetching(config: RunConfig, *, functions: bool = True) -> list[str]:
    """Check what is on this machine, without network.

    Args:
        config: of the run.
        functions: import the reward functions and try them.

    Returns:
        Settings whose value a run would download, which were therefore not checked.

    Raises:
        ConfigError: a setting is not valid; the message names the first one and its fix.
    """
    check_judge(config.evaluate.judge)
    data, policy, reward = config.data, config.policy, config.reward
    fetched = []

    def check_if_local(
        setting: str, name: str, revision: str | None, on_hub: bool, check: Callable[[], object]
    ) -> None:
        if on_hub or name.startswith("s3://"):
            fetched.append(f"{setting} {name}{'@' + revision if revision else ''}")
        else:
            check()

    on_hub = not data.path.startswith("s3://") and locate(data).kind == "hub"
    check_if_local(
        "data.path", data.path, data.revision, on_hub, lambda: check_rows(locate(data), data)
    )
    has_rows = not fetched
    check_if_local(
        "policy.model",
        policy.model,
        policy.revision,
        _is_hub_id(policy.model),
        partial(check_policy, config),
    )
    to_fetch = len(fetched)
    for setting, each in reward.classifiers:
        check_if_local(
            f"{setting}.model",
            each.model,
            each.revision,
            _is_hub_id(each.model),
            partial(check_classifier, each, setting),
        )
    if functions:
        check_functions(config)
    if len(fetched) == to_fetch and has_rows:
        _try_reward(config, locate(data), functions)
    return fetched


def _is_hub_id(name: str) -> bool:
    return name != "lab" and not looks_like_path(name)


def check_reachable(config: RunConfig) -> None:
    """Check that this node can read what the settings name, which `check` has verified before.

    Raises:
        ConfigError: this node cannot read one of them.
    """
    models: list[tuple[str, PolicyConfig | ClassifierConfig]] = [
        ("policy", config.policy),
        *config.reward.classifiers,
    ]
    for setting, section in models:
        name = f"{setting}.model"
        folder = local_folder(section.model, section.revision, name, weights=False)
        _settings(folder, section.model, name)
        _check_safetensors(folder, section.model, name, section.revision)
    if config.policy.adapter is not None:
        local_folder(config.policy.adapter, None, "policy.adapter")
    check_functions(config)
    locate(config.data)


def check_policy(config: RunConfig) -> None:
    """Check that the policy is an encoder-decoder with a tokenizer, and that the adapter fits it.

    Raises:
        ConfigError: it is not, or the adapter does not fit.
    """
    from ray_detox.models.classifier import check_vocabulary

    policy = config.policy
    folder = local_folder(policy.model, policy.revision, "policy.model", weights=False)
    settings = _settings(folder, policy.model, "policy.model")
    if not _is_encoder_decoder(folder, settings):
        kind = (_architectures(settings) or [settings.get("model_type", "unknown")])[0]
        raise ConfigError(
            f"policy.model is {policy.model!r}, a {kind}; expected an encoder-decoder such as "
            "google/flan-t5-base. For decoder-only models use the trainers of trl."
        )
    _check_safetensors(folder, policy.model, "policy.model", policy.revision)
    tokenizer = _check_tokenizer(folder, policy.model, "policy.model")
    model = _without_weights(folder, policy.model)
    check_vocabulary(tokenizer, model, policy.model, "policy.model")
    _check_positions(model, config)
    tied = _is_head_tied(folder, settings, model)
    if policy.adapter is not None:
        adapter = _check_adapter(model, config)
    else:
        adapter = _check_lora_targets(model, config)
    _check_generation(folder, config, tokenizer, model, adapter, tied)


def _check_generation(
    folder: Path, config: RunConfig, tokenizer: Any, model: Any, adapter: Any, tied: bool
) -> None:
    """Check the model's generation settings, and that its architecture samples, scores and merges."""
    from ray_detox.models import constraints, trial
    from ray_detox.models.output_head import find_head, vocabulary_size

    policy, sampling, settings = config.policy, config.sampling, model.config
    try:
        generation = constraints.generation_config(folder)
    except Exception as error:  # of any kind, for values that transformers does not expect
        raise ConfigError(
            f"policy.model is {policy.model!r}, and its generation_config.json cannot be used: "
            f"{first_line(error)}. Correct the file, or copy the model again."
        ) from error
    first = constraints.forced_bos_id(tokenizer, policy)
    vocabulary = vocabulary_size(find_head(model))
    rules = constraints.generation_rules(generation, settings, sampling, first, vocabulary)
    constraints.check_language(rules, tokenizer, policy.model)
    if policy.model == "lab":
        return  # the embedded model is trained and exported by the tests of this package
    failure = trial.cached_trial(settings, rules, adapter, sampling, tied=tied)
    if failure is not None:
        raise ConfigError(
            f"policy.model is {policy.model!r}, and a small random copy of this "
            f"{settings.model_type} model shows that it cannot be trained here: {failure}."
        )


def generation_notes(config: RunConfig, fetched: Sequence[str]) -> list[str]:
    """Describe the model's generation settings, unless a run would have to download the model.

    Args:
        config: of the run, checked.
        fetched: from `check_without_fetching`.
    """
    if any(what.startswith("policy.model ") for what in fetched):
        return []
    from ray_detox.models.constraints import describe_generation

    return describe_generation(config.policy, config.sampling)


def _settings(folder: Path, name: str, setting: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        patterns = ("*", "snapshots/*", "*/snapshots/*")  # checkpoints, and caches of the hub
        below = [found for one in patterns for found in folder.glob(f"{one}/config.json")]
        newest = max(below, key=lambda found: found.stat().st_mtime, default=None)
        inner = newest and f"{name.rstrip('/')}/{newest.parent.relative_to(folder)}"
        other = f"that of a model, such as {inner}," if inner else "one of a model"
        raise ConfigError(
            f"{setting} is {name!r}, and no config.json is in that folder. Set it to {other} that "
            "save_pretrained wrote."
        )
    try:
        settings = parse_object(read_file(file))
    except DamagedError as error:
        raise ConfigError(
            f"{setting} is {name!r}, and its config.json is damaged: {error}."
        ) from None
    quantized = settings.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
        raise ConfigError(
            f"{setting} is {name!r}, whose weights are quantized ({method or 'quantization_config'}), which "
            "is not supported. Set it to the model in float32, bfloat16 or float16 that it was made from."
        )
    return settings


def _is_encoder_decoder(folder: Path, settings: dict[str, Any]) -> bool:
    """Return what config.json says, or else what its family's class does."""
    from transformers import AutoConfig

    if "is_encoder_decoder" in settings:
        return bool(settings["is_encoder_decoder"])
    try:
        return bool(AutoConfig.from_pretrained(folder, trust_remote_code=False).is_encoder_decoder)
    except Exception:  # of any kind, for values that no class expects; refused by the caller
        return False


def _architectures(settings: dict[str, Any]) -> list[str]:
    """Return the architectures that a config.json names; none if they are not a list of names."""
    found = settings.get("architectures")
    return list(map(str, found)) if isinstance(found, list) else []


def _check_safetensors(folder: Path, name: str, setting: str, revision: str | None = None) -> None:
    is_local = name == "lab" or name.startswith("s3://") or Path(name).expanduser().is_dir()
    if any(folder.glob("*.safetensors")):
        return
    if is_local:
        others = sorted(file.name for kind in OTHER_WEIGHTS for file in folder.glob(kind))
        raise ConfigError(
            f"{setting} is {name!r}, which has no .safetensors file. Pickled weights can run code and are "
            "not read, nor are those of ONNX, TensorFlow, Flax and GGUF"
            f"{f' (it has {others[0]})' if others else ''}; save the model again with save_pretrained."
        )
    if setting == "policy.adapter":
        raise ConfigError(
            f"policy.adapter is the hub id {name!r}, which has no .safetensors file. Pickled weights can "
            "run code and are not read; load the adapter with peft where you trust it, save it with "
            "save_pretrained, and set policy.adapter to that folder."
        )
    if is_hub_offline():
        raise ConfigError(
            f"{setting} is the hub id {name!r}, of which the cache holds no weights, and the hub is "
            "switched off (HF_HUB_OFFLINE). Unset HF_HUB_OFFLINE to download them, or set a folder."
        )
    if not hub_has_safetensors(name, revision):
        raise ConfigError(
            f"{setting} is the hub id {name!r}, which has no .safetensors file at this revision. "
            "Pickled weights can run code and are not read; set "
            f"{setting.rpartition('.')[0]}.revision to one that has (many conversions are open pull "
            "requests, refs/pr/NUMBER), or convert the model and set its folder."
        )


def _check_tokenizer(folder: Path, name: str, setting: str) -> Any:
    """Check that a tokenizer is in the folder, and return it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    # Without these files transformers 5 does not fail: it returns a tokenizer with no vocabulary.
    described = read_if_there(folder / "tokenizer_config.json")
    try:
        kind = parse_object(described).get("tokenizer_class") if described else None
    except DamagedError as error:
        raise ConfigError(
            f"{setting} is {name!r}, and its tokenizer_config.json is damaged: {error}. Save the tokenizer "
            "again with save_pretrained."
        ) from None
    has_vocabulary = any(file for pattern in VOCABULARIES for file in folder.glob(pattern))
    if not has_vocabulary and kind not in WITHOUT_VOCABULARY:
        raise ConfigError(
            f"{setting} is {name!r}, and no tokenizer is in it ({', '.join(VOCABULARIES)}). "
            "Save the tokenizer into the same folder with save_pretrained."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(
            f"{setting} is {name!r}, and no tokenizer can be loaded from it ({type(error).__name__}: "
            f"{first_line(error)}). Copy the tokenizer's files again, or save it again with save_pretrained."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{setting} is {name!r}, and its tokenizer_class is {type(tokenizer).__name__}, which does "
            "not turn texts into tokens by itself. Use a model with a plain tokenizer."
        )
    special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
    if kind not in WITHOUT_VOCABULARY and len(tokenizer.get_vocab().keys() - special) < 2:
        files = ", ".join(tokenizer.vocab_files_names.values())
        raise ConfigError(
            f"{setting} is {name!r}, and its {type(tokenizer).__name__} has no vocabulary, so every word "
            f"would be unknown; it reads {files}. Copy the tokenizer's files again, under these names."
        )
    return tokenizer


def _check_adapter(model: Any, config: RunConfig) -> Any:
    """Check that the starting adapter is a LoRA of this model: layers, names and shapes match.

    Returns:
        peft's settings of the adapter.
    """
    import peft
    from safetensors import SafetensorError, safe_open

    from ray_detox.models.adapters import (
        check_adapter_settings,
        check_not_shared,
        check_patterns,
        read_adapter,
    )

    name = config.policy.adapter
    assert name is not None
    adapter = local_folder(name, None, "policy.adapter")
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"policy.adapter is {name!r}, and no adapter_config.json is there. "
            "Set it to a folder that peft's save_pretrained wrote."
        )
    _check_safetensors(adapter, name, "policy.adapter")
    read_adapter(adapter, name)
    try:
        described = peft.PeftConfig.from_pretrained(str(adapter))
        if described.peft_type != "LORA":
            raise ConfigError(
                f"policy.adapter is {name!r}, an adapter of type "
                f"{getattr(described.peft_type, 'value', 'unknown')}; expected LORA."
            )
        with safe_open(str(adapter / "adapter_model.safetensors"), "np") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"policy.adapter is {name!r}, and it cannot be read: {error}.") from error
    check_adapter_settings(described, name)
    check_patterns(described, model, name)
    _check_base_model(described.base_model_name_or_path, model.config.model_type, config)
    described.base_model_name_or_path = None  # or peft warns if the model's folder has moved
    try:
        model = _attach(model, described)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise ConfigError(
            f"policy.adapter is {name!r}, and it does not fit {config.policy.model}: {error}"
        ) from error
    # False, or peft would look up on the hub whether embeddings belong to the adapter. Only LoRA
    # weights are compared.
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    for key in sorted(key for key in {*found, *expected} if "lora_" in key):
        if found.get(key) != expected.get(key):
            raise ConfigError(
                f"policy.adapter is {name!r}, and it was not trained on {config.policy.model}: "
                f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}."
            )
    check_not_shared(model, "policy.adapter", repr(name))
    return described


def _attach(model: Any, described: Any) -> Any:
    """Attach an adapter to a model without weights; warnings about weights are left out."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # On the meta device as well: a rank of thousands would take gigabytes.
        return peft.get_peft_model(model, described, low_cpu_mem_usage=True)


def _check_base_model(trained_on: str | None, model_type: str, config: RunConfig) -> None:
    """Check the base model that an adapter names; shapes alone do not tell one T5 from another."""
    model = config.policy.model
    if not trained_on:
        return
    reason = None
    is_hub_id = not any(n == "lab" or looks_like_path(n) for n in (trained_on, model))
    file = Path(trained_on) / "config.json"
    if is_hub_id and trained_on != model:
        reason = f"{trained_on!r} by its adapter_config.json"
    elif file.is_file():
        found = _settings(file.parent, trained_on, "policy.adapter").get("model_type")
        reason = f"a {found} model, {trained_on!r}" if found != model_type else None
    if reason is not None:
        raise ConfigError(
            f"policy.adapter is {config.policy.adapter!r}, which was trained on {reason}, and "
            f"policy.model is {model!r}. Set policy.model to the adapter's base model; if both are "
            "the same model, correct base_model_name_or_path in adapter_config.json."
        )


def _without_weights(folder: Path, name: str) -> Any:
    """Build the model on the meta device: layers and shapes, but no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from ray_detox.models.sizes import check_size, check_weights

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any kind, for values that no class expects
        raise ConfigError(
            f"policy.model is {name!r}, and transformers has no encoder-decoder language model for "
            f"its config.json: {first_line(error)}. Set it to an encoder-decoder of transformers "
            f"{version('transformers')}, or install a version that has it."
        ) from error
    check_size(model, folder, name, "policy.model")
    check_weights(AutoModelForSeq2SeqLM, folder, name, "policy.model")
    return model


def _check_positions(model: Any, config: RunConfig) -> None:
    """Check that prompts and responses are no longer than the model's tables of positions.

    Raises:
        ConfigError: one of them may be longer.
    """
    from ray_detox.models.classifier import position_limits

    for setting, asked, part in (
        ("data.max_prompt_tokens", config.data.max_prompt_tokens, model.get_encoder()),
        ("sampling.max_new_tokens", config.sampling.highest_limit, model.get_decoder()),
    ):
        limit = min(position_limits(part), default=asked)
        if asked > limit:
            raise ConfigError(
                f"{setting} allows {asked:,} tokens, and policy.model {config.policy.model!r} has "
                f"positions for {limit:,}. Set it to at most {limit:,}."
            )


def _is_head_tied(folder: Path, settings: dict[str, Any], model: Any) -> bool:
    """Return whether the output head shares the embedding's weight; if not, untie that of `model`.

    transformers 5 takes every T5 for tied and looks for a head of its own among the weights. The
    weights of a hub model are not here yet; its config.json then has the value of version 4.
    """
    from safetensors import safe_open
    from torch import empty_like
    from torch.nn import Linear, Parameter

    head = model.get_output_embeddings()
    key = next((f"{name}.weight" for name, layer in model.named_modules() if layer is head), None)
    tied = settings.get("tie_word_embeddings") is not False
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), "np") as weights:
            tied = tied and key not in set(weights.keys())
    if not tied and isinstance(head, Linear):
        head.weight = Parameter(empty_like(head.weight))
    return tied


def _check_lora_targets(model: Any, config: RunConfig) -> Any:
    """Check that the LoRA targets name linear layers of the model, with weights of their own.

    Returns:
        peft's settings of the adapter.
    """
    from torch.nn import Linear

    from ray_detox.models.adapters import check_not_shared
    from ray_detox.models.loading import lora_config

    linear = {n for n, m in model.named_modules() if isinstance(m, Linear)}
    for target in config.policy.lora_targets:
        pattern = re.compile(rf"(.*\.)?{re.escape(target)}$")
        if not any(pattern.match(name) for name in linear):
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"policy.lora_targets names {target!r}, and {config.policy.model} has no linear "
                f"layer of that name; it has {', '.join(leaves)}."
            )
    described = lora_config(config.policy)
    try:
        adapted = _attach(model, described)
    except ValueError as error:
        raise ConfigError(
            f"policy.lora_targets is {list(config.policy.lora_targets)}, and no adapter can be "
            f"attached to {config.policy.model} with it: {str(error).splitlines()[0]}"
        ) from error
    check_not_shared(adapted, "policy.lora_targets", str(list(config.policy.lora_targets)))
    return described


def check_reward(config: RunConfig, source: Source, *, functions: bool = True) -> None:
    """Check that all classifiers and functions of the reward exist and fit; try small local ones.

    Raises:
        ConfigError: one of them does not, or the reward prefers insults.
    """
    for setting, each in config.reward.classifiers:
        check_classifier(each, setting)
    if functions:
        check_functions(config)
    _try_reward(config, source, functions)


def check_classifier(config: ClassifierConfig, setting: str) -> None:
    """Check that a model is a sequence classifier with the label and a tokenizer that fits.

    Args:
        config: of the classifier.
        setting: the setting that describes it, such as `reward`.

    Raises:
        ConfigError: it is not.
    """
    from transformers import AutoModelForSequenceClassification

    from ray_detox.models.classifier import (
        check_vocabulary,
        load_model,
        load_tokenizer,
        read_head,
    )
    from ray_detox.models.sizes import check_size, check_weights

    name = f"{setting}.model"
    folder = local_folder(config.model, config.revision, name, weights=False)
    settings = _settings(folder, config.model, name)
    kinds = _architectures(settings)
    if not any("SequenceClassification" in kind for kind in kinds):
        raise ConfigError(
            f"{name} is {config.model!r}, a {(kinds or ['model of unknown kind'])[0]}; "
            "expected a sequence classifier such as facebook/roberta-hate-speech-dynabench-r4-target."
        )
    read_head(settings, config, setting)
    _check_safetensors(folder, config.model, name, config.revision)
    _check_tokenizer(folder, config.model, name)
    model = load_model(folder, config.model, name, weights=False)
    check_size(model, folder, config.model, name)
    check_weights(AutoModelForSequenceClassification, folder, config.model, name)
    check_vocabulary(load_tokenizer(folder), model, config.model, name)


def check_functions(config: RunConfig) -> None:
    """Check that the reward functions can be imported and called.

    Raises:
        ConfigError: one of them cannot.
    """
    functions = [term for term in config.reward.terms if term.function is not None]
    if functions:
        from ray_detox.rewards.functions import load_reward_function

        for term in functions:
            load_reward_function(term)


def _try_reward(config: RunConfig, source: Source, functions: bool) -> None:
    """Try the reward on sentences if its classifiers and the data are on this machine, and small.

    Otherwise the reward actors do it, before the first step. Without its functions it is another
    reward, which is not tried.

    Raises:
        ConfigError: the reward prefers insults, or a function of it failed.
    """
    if not config.reward.check_sentences or source.kind == "hub":
        return
    if not functions and any(term.function is not None for term in config.reward.terms):
        return
    weights = 0
    for setting, each in config.reward.classifiers:
        if _is_hub_id(each.model) or each.model.startswith("s3://"):
            return
        folder = local_folder(each.model, each.revision, f"{setting}.model")
        weights += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if weights > MOST_WEIGHTS_TO_TRY:
        return
    from ray_detox.rewards.reward import Reward
    from ray_detox.rewards.sentences import SampleRow, check_sentences

    row = _first_row(config, source)
    prompt = prompt_text(row[config.data.dialogue_column], config.data)
    check_sentences(Reward(config.reward), SampleRow(prompt, row))


def _first_row(config: RunConfig, source: Source) -> dict[str, Any]:
    """Return the first row of the data that becomes a prompt; `check_rows` has found one."""
    if source.kind == "lab":
        return dict(corpus.rows("ppo", 1)[0])
    rows = peek(source, config.data)
    row = next(row for row in rows if reason_to_leave_out(row, config.data) is None)
    # Functions get JSON values, as `data.prompts.prepare` makes them.
    converted: dict[str, Any] = json.loads(json.dumps(dict(row), default=str))
    return converted


def untried_functions(config: RunConfig) -> list[str]:
    """Return a remark on the functions that a check did not try, if there are any."""
    names = [term.function for term in config.reward.terms if term.function is not None]
    if not names:
        return []
    return [
        f"not imported or tried: {', '.join(names)}; add --try-functions to do so, which runs their code"
    ]


def data_notes(config: RunConfig) -> list[str]:
    """Return a remark if a local folder of data has splits that a run does not read."""
    if config.data.path.startswith("s3://"):
        return []
    note = locate(config.data).note
    return [note] if note else []


def reward_notes(config: RunConfig, *, functions: bool = True) -> list[str]:
    """Return remarks on a valid reward that may not be meant.

    Args:
        config: of the run, checked.
        functions: the check has tried the reward functions.

    Raises:
        ConfigError: a file of the data cannot be read.
    """
    found = [] if functions else untried_functions(config)
    for setting, each in config.reward.classifiers:
        if each.label is not None and each.label.casefold() in TOXIC_NAMES:
            found.append(
                f"{setting}.label is {each.label!r}, so responses are rewarded for it; if it means "
                f"toxic, set {setting}.toxic_label={each.label} {setting}.label=null"
            )
    names = [term.name for term in config.reward.terms if term.function is not None]
    data = config.data
    if names and not data.path.startswith("s3://") and locate(data).kind != "hub":
        from ray_detox.rewards.functions import RESERVED_COLUMNS

        for column in sorted(RESERVED_COLUMNS & _first_row(config, locate(data)).keys()):
            found.append(
                f"the functions of reward.terms ({', '.join(names)}) do not get the column "
                f"{column!r} of the data, because this keyword has another meaning; rename the column "
                "to pass it"
            )
    return found


def check_local_gpus(config: RunConfig, count_gpus: Callable[[], int]) -> None:
    """Check that this machine has the GPUs that the settings ask for; for runs on a local cluster.

    Args:
        config: of the run.
        count_gpus: called only if the settings ask for GPUs, because it imports torch.

    Raises:
        ConfigError: they ask for more GPUs than this machine has.
    """
    asked = (config.cluster.gpus_per_worker or 0) + (config.serving.gpus_per_actor or 0)
    if asked:
        have = count_gpus()
        need = needs(config, have)
        # A local cluster starts with as many CPUs as the run needs: Ray only counts them.
        machine = Bundle(need.cpus, have)
        short = shortfall(need.phases, [Node("this machine", machine, machine)])
        if short:
            raise ConfigError(short)


def check_local_cpus(config: RunConfig, have: int) -> None:
    """Check that no process of a run on this machine asks for more CPUs than the machine has.

    Ray only counts CPUs, so more processes than CPUs can share them. A process with more threads than
    CPUs would be slower than with fewer.

    Args:
        config: of the run.
        have: CPUs that this process may use.

    Raises:
        ConfigError: one does.
    """
    for setting, asked in (
        ("cluster.cpus_per_worker", config.cluster.cpus_per_worker),
        ("serving.cpus_per_actor", config.serving.cpus_per_actor),
    ):
        if asked > max(have, 1):
            raise ConfigError(
                f"{setting} is {asked:g}, and this machine has {have} CPU{'s' * (have != 1)} for this "
                f"process, as affinity, container or SLURM allow. Set {setting} to at most {have}."
            )


def check_output(folder: Path) -> None:
    """Check that the output folder can be created and written to, without creating it.

    Raises:
        ConfigError: it cannot.
    """
    reason = reason_not_writable(folder) or reason_disk_full(folder)
    if reason:
        raise ConfigError(
            f"The output folder {folder} cannot be written to ({reason}). Choose another with "
            "--output."
        )
