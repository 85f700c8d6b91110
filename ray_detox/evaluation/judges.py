"""A second opinion on toxicity, from a model that the policy was not trained against.

A policy can learn to exploit its reward model. The judge is a different kind of model (linear over
words, trained on human labels), so a gain that both measure is unlikely to be such an exploit.
"""

import importlib.util
from collections.abc import Callable, Sequence

from ray_detox.config import ConfigError

Judge = Callable[[Sequence[str]], list[float]]


def check_judge(name: str) -> None:
    """Check that a judge is installed.

    Raises:
        ConfigError: its package is missing.
    """
    if name == "profanity-check" and importlib.util.find_spec("profanity_check") is None:
        raise ConfigError(
            "evaluate.judge is 'profanity-check', and the package alt-profanity-check is not "
            "installed. Run: pip install -c constraints.txt 'ray-detox[judge]', or set "
            "evaluate.judge=none."
        )


def load_judge(name: str) -> Judge | None:
    """The judge of that name, from texts to probabilities of being offensive; None for `none`."""
    if name == "none":
        return None
    check_judge(name)
    from profanity_check import predict_prob

    return lambda texts: [float(p) for p in predict_prob(list(texts))]
