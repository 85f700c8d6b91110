"""What a run was started with: fingerprints of its models, functions and package.

`held.py` keeps them in the run's record and compares them at every resume and before every measurement.
The fingerprint of the prompts joins them once they are prepared.
"""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from ray_detox.config import RunConfig
from ray_detox.models.sources import fingerprint

UNKNOWN = "unknown"


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Return the fingerprints of a run's models, reward functions and package, by name.

    A model's is the commit of a hub model, else a SHA-256 over its files.

    Raises:
        ConfigError: a model cannot be found.
    """
    policy = config.policy
    found = {
        "package": f"ray-detox {importlib.metadata.version('ray-detox')}",
        "policy": fingerprint(policy.model, policy.revision, "policy.model"),
    }
    if policy.adapter is not None:
        found["policy.adapter"] = fingerprint(policy.adapter, None, "policy.adapter")
    for setting, each in config.reward.classifiers:
        found[setting] = fingerprint(each.model, each.revision, f"{setting}.model")
    for number, term in enumerate(config.reward.terms):
        if term.function is not None:
            found[f"reward.terms[{number}].function"] = _of_function(term.function)
    return found


def _of_function(path: str) -> str:
    """Return a hash of the source file of a function, named by its import path."""
    try:
        spec = importlib.util.find_spec(path.rpartition(".")[0])
        source = Path(spec.origin).read_bytes() if spec and spec.origin else None
    except (ImportError, AttributeError, ValueError, OSError):  # only the nodes have it
        return UNKNOWN
    return f"sha256:{hashlib.sha256(source).hexdigest()}" if source is not None else UNKNOWN
