"""Model sources: turns the name of a model in the settings into a local folder, on every node.

A name is `lab` (a model inside this package), a local folder, an `s3://` address, or a hub id.
Only configuration, tokenizer and safetensors files are downloaded; no code of a model repository
is executed and nothing is unpickled.
"""

import errno
import functools
import hashlib
import os
import re
import reprlib
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from ray_detox import lab
from ray_detox.bounded import MAX_JSON_BYTES, DamagedError, parse, read_regular
from ray_detox.errors import ConfigError, first_line
from ray_detox.models.s3 import advice, open_s3

DESCRIPTION_FILES = ["*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.bpe"]
WEIGHT_FILES = ["*.safetensors"]
CODE_FILES = ["config.json", "tokenizer_config.json"]
"""Files of a model whose `auto_map` can name Python code of the model's repository."""
KERNEL_SETTINGS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""Settings of config.json that can name compiled code of the hub, such as `owner/kernel`."""
PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
MAX_NUMBERS = {"layer": 1_000, "label": 100_000, "": 1 << 26}
"""Maximum of the whole numbers in a config.json, by a part of their name, the first that fits.

transformers builds an object for each layer and label before it reads any weight."""
LAB_MODELS = {"policy": lab.T5, "reward": lab.ROBERTA}
"""Embedded models by section of the settings."""


def local_folder(name: str, revision: str | None, setting: str, *, weights: bool = True) -> Path:
    """Return the folder of the model called `name`, downloading the model first if necessary.

    Args:
        name: `lab`, a folder, `s3://bucket/prefix`, or a hub id.
        revision: commit or tag of a hub model.
        setting: the setting that holds the name, for messages; also selects the `lab` model.
        weights: False downloads only configuration and tokenizer of a hub model.

    Raises:
        ConfigError: the model does not exist, cannot be reached, names code of its own, or has a file
            that no library should read.
    """
    folder = _find_folder(name, revision, setting, weights)
    _check_files(folder, name, setting)
    _refuse_code(folder, name, setting)
    if setting.endswith(".model"):
        _refuse_adapter(folder, name, setting)
    return folder


def _refuse_adapter(folder: Path, name: str, setting: str) -> None:
    """Check that a model's folder has no adapter, which transformers would attach to it unasked."""
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{setting} is {name!r}, and an adapter (adapter_config.json) is in the folder of that model. "
            "Merge it into the model, or move it into a folder of its own (a policy's is then set with "
            "policy.adapter)."
        )


def _refuse_code(folder: Path, name: str, setting: str) -> None:
    """Check that a model needs no code of its own.

    transformers would ask on the terminal whether to run it if `trust_remote_code` was not False.
    """
    for file in CODE_FILES:
        if not (folder / file).exists():
            continue
        content = parse(read_regular(folder / file, MAX_JSON_BYTES))
        if isinstance(content, dict) and content.get("auto_map"):
            raise ConfigError(
                f"{setting} is {name!r}, and its {file} names Python code of its own (auto_map), "
                "which ray-detox does not run. Set it to a model whose classes are part of "
                "transformers; if this one's are, remove auto_map in a local copy of it."
            )
        for key in KERNEL_SETTINGS:
            if isinstance(content, dict) and "/" in str(content.get(key)):
                raise ConfigError(
                    f"{setting} is {name!r}, and its {file} names code of the hub ({key}), which ray-detox "
                    f"does not run. Remove {key} in a local copy of the model."
                )


def _check_files(folder: Path, name: str, setting: str) -> None:
    """Check the files of a model that libraries read: each is a file, and JSON is bounded.

    Raises:
        ConfigError: one of them is not.
    """
    for file in sorted(folder.iterdir()):
        if any(file.match(pattern) for pattern in DESCRIPTION_FILES + WEIGHT_FILES):
            try:
                about = file.stat()
                if about.st_size < 1024 and file.is_file() and _is_pointer(file):
                    raise ConfigError(
                        f"{setting} is {name!r}, and its {file.name} is a pointer of Git LFS and not the "
                        "file. Fetch it with: git lfs pull"
                    )
                if file.suffix == ".json" or not stat.S_ISREG(about.st_mode):
                    _check_json(file, _state(about))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
            except DamagedError as error:
                reason = f"is damaged: {error}"
            else:
                continue
            raise ConfigError(
                f"{setting} is {name!r}, and its {file.name} {reason}. Correct the file, or copy the "
                "model again."
            )


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(64).startswith(b"version https://git-lfs")


@functools.lru_cache(maxsize=1024)
def _check_json(file: Path, state: tuple[int, ...]) -> None:
    """Check a JSON file, once per state: a run asks for the same folder many times.

    Raises:
        DamagedError: it is not valid JSON, or asks for more than any model.
    """
    content = parse(read_regular(file, MAX_JSON_BYTES))
    if file.name == "config.json":
        if not isinstance(content, dict):
            raise DamagedError("it does not have an object with names and values")
        _check_numbers(content)
    elif file.name.endswith(".index.json"):
        _check_index(content)


def _check_index(index: Any) -> None:
    """Check that the index of a model in parts names safetensors of the same folder and nothing else.

    transformers would read a file of another kind with `torch.load`, wherever it is.
    """
    parts = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(parts, dict):
        raise DamagedError("it has no weight_map with the files of the weights")
    for part in parts.values():
        if not (isinstance(part, str) and re.fullmatch(r"[\w.-]+\.safetensors", part)):
            raise DamagedError(
                f"it names {reprlib.repr(part)}, expected a .safetensors file in the same folder"
            )


def _check_numbers(settings: Any) -> None:
    """Check that no size in a config.json is far beyond those of any model."""
    for name, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
        if isinstance(value, dict | list):
            _check_numbers(value)
        elif isinstance(value, int) and "max_length" not in str(name):
            most = next(most for part, most in MAX_NUMBERS.items() if part in str(name))
            if value > most:
                raise DamagedError(f"it has {name}={value:.4g}, expected at most {most:,}")


def _state(about: os.stat_result) -> tuple[int, ...]:
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _find_folder(name: str, revision: str | None, setting: str, weights: bool) -> Path:
    section = setting.partition(".")[0]
    if name == "lab" and setting.endswith(".model") and section in LAB_MODELS:
        return LAB_MODELS[section]
    if name.startswith("s3://"):
        return _from_s3(name, setting)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    hint = address_hint(name)
    if hint is not None:
        raise ConfigError(f"{setting} is {name!r}, which is no address of a model. {hint}.")
    if looks_like_path(name):
        problem = "this is a file and no folder" if path.exists() else "no such folder is here"
        raise ConfigError(
            f"{setting} is {name!r}, and {problem}. Give the folder of a model that "
            "save_pretrained wrote, a hub id or an s3:// address."
        )
    return _from_hub(name, revision, setting, weights)


def fingerprint(name: str, revision: str | None, setting: str) -> str:
    """Return a fingerprint of a model's content, which differs for another model of the same name.

    It is the commit of a hub model, else `folder_fingerprint`. Arguments as for `local_folder`.
    """
    folder = local_folder(name, revision, setting, weights=False)
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT.
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return f"commit:{folder.name}"
    return folder_fingerprint(folder)


def folder_fingerprint(folder: Path) -> str:
    """Return a SHA-256 over names and contents of a model's description and weight files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if any(file.match(pattern) for pattern in DESCRIPTION_FILES + WEIGHT_FILES):
            about = file.stat()
            inner = _hash_file(file, _state(about))
            digest.update(f"{file.name} {inner}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@functools.lru_cache(maxsize=1024)
def _hash_file(file: Path, state: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file, read once per state: a run asks again after its training."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return the folder for files that can be made again, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ray-detox"


def address_hint(name: str) -> str | None:
    """Return what to give in place of an address that is neither s3:// nor a path; None if it is none."""
    scheme, mark, rest = name.partition(":")
    if not mark or not re.fullmatch(r"[A-Za-z][\w+.-]+", scheme) or Path(name).exists():
        return None
    parts = rest.strip("/").split("/")
    if scheme.lower() in ("s3", "s3a", "s3n") or ".amazonaws.com" in parts[0] or ":s3:" in name:
        return "Give it as s3://BUCKET/KEY"
    if scheme == "hf" or parts[0] in ("huggingface.co", "hf.co"):
        return "Give the id of the hub, OWNER/NAME"
    if scheme == "file":
        return "Give the path without file://"
    if "://" in name:
        return f"Addresses with {scheme}:// are not read; download the files first, or copy them to s3://"
    return None


def looks_like_path(name: str) -> bool:
    """Return True if `name` can only be a path on this machine and not a hub id."""
    return name.startswith(("/", ".", "~")) or not HUB_ID.match(name) or Path(name).exists()


def _from_hub(name: str, revision: str | None, setting: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    patterns = DESCRIPTION_FILES + (WEIGHT_FILES if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{setting} is {name!r}, and the hub has no such model or denies you access. Check the "
            "id, or give a local folder or an s3:// address."
        ) from error
    except Exception as error:  # the hub's client raises errors of httpx as well
        raise ConfigError(
            f"{setting} is the hub id {name!r}, and {_why_not_from_hub(error, setting)}"
        ) from error


def _why_not_from_hub(error: Exception, setting: str) -> str:
    """Describe why a model could not be downloaded, and what helps; ends with a full stop."""
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of the cache is full ({constants.HF_HUB_CACHE}). Free some of it, or set HF_HOME to "
            "a folder on another disk."
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"the cache cannot be written to ({error.strerror}: {error.filename or constants.HF_HUB_CACHE}). "
            "Set HF_HOME to a folder that you may write to."
        )
    advice = f"Download the model elsewhere and set {setting}=/path/to/its/folder (or s3://bucket/prefix)."
    if constants.HF_HUB_OFFLINE:
        return (
            "it is not in the cache, and the hub is switched off (HF_HUB_OFFLINE). Unset it to "
            f"download. {advice}"
        )
    proxies = [name for name in PROXIES if os.environ.get(name)]
    if proxies or "Proxy" in type(error).__name__:
        return (
            f"the hub cannot be reached through the proxy ({type(error).__name__}; "
            f"{', '.join(proxies) or 'of the system'}). Correct the proxy's address and sign-in, or set "
            f"no_proxy. {advice}"
        )
    return f"the hub cannot be reached from here ({type(error).__name__}). {advice}"


def is_hub_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` allows only what is in the hub's cache."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_has_safetensors(name: str, revision: str | None) -> bool:
    """Return whether a hub model has safetensors; True if the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(
            name, revision=revision, allow_patterns=WEIGHT_FILES, dry_run=True
        )
    except Exception:  # no network, with the model in the cache; the client raises errors of httpx
        return True
    return len(files) > 0


def _from_s3(address: str, setting: str) -> Path:
    """Copy the model files under `address` into a local cache, keyed by their names and times."""
    from pyarrow import fs

    filesystem, root = open_s3(address)

    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise ConfigError(
            f"{setting} is {address!r}, and listing it failed: {first_line(error)}. "
            f"{advice(error)}."
        ) from error
    files = [info for info in infos if info.type == fs.FileType.File]
    # Keys of a bucket may have `..` in them, which would lead out of the cache.
    wanted = [
        f
        for f in files
        if any(Path(f.path).match(p) for p in DESCRIPTION_FILES + WEIGHT_FILES)
        and ".." not in Path(f.path).relative_to(root).parts
    ]
    if not wanted:
        raise ConfigError(
            f"{setting} is {address!r}, and no model files are there. Give the prefix of a model "
            "that save_pretrained wrote."
        )

    listing = "\n".join(
        f"{f.path} {f.size} {f.mtime_ns}" for f in sorted(wanted, key=lambda f: f.path)
    )
    key = hashlib.sha256(listing.encode()).hexdigest()[:24]
    cache = cache_folder() / key
    if cache.is_dir():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Downloaded to a temporary folder and renamed, so that no other process sees half a model.
    part = Path(tempfile.mkdtemp(dir=cache.parent))
    for file in wanted:
        target = part / Path(file.path).relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(file.path) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    try:
        part.rename(cache)
    except OSError:  # another process has finished the same download
        shutil.rmtree(part)
    return cache
