"""Make an encoder-decoder language model less toxic with PPO, on Ray.

The names in `__all__` are the public API. They are imported when they are first used, so that
`import ray_detox` costs nothing.

Example:
    import ray_detox

    config = ray_detox.load_config("lab", ["train.steps=4"])
    report = ray_detox.train(config, run_id="first")
    print(report["verdict"]["sentence"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_detox.api import evaluate, results, train
    from ray_detox.config import RunConfig
    from ray_detox.errors import ConfigError
    from ray_detox.recipes.loading import load_config
    from ray_detox.store.errors import StoreError

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "RunConfig",
    "StoreError",
    "__version__",
    "evaluate",
    "load_config",
    "results",
    "train",
]

_HOMES = {
    "ConfigError": "ray_detox.errors",
    "RunConfig": "ray_detox.config",
    "StoreError": "ray_detox.store.errors",
    "evaluate": "ray_detox.api",
    "load_config": "ray_detox.recipes.loading",
    "results": "ray_detox.api",
    "train": "ray_detox.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names as well as those that are loaded."""
    return sorted({*globals(), *__all__})
