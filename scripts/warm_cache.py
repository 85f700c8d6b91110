"""Download the models and data of a recipe from the hub or S3 into this machine's cache.

python scripts/warm_cache.py RECIPE [SETTING=VALUE ...]

A run would download them itself, but on every node at once and while its GPUs wait.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

from ray_detox.config import ConfigError
from ray_detox.data.files import load_hub, locate
from ray_detox.models.sources import local_folder
from ray_detox.recipes.loading import load_config


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    faults = 0
    try:
        config = load_config(words[0], words[1:])
    except ConfigError as error:
        print(f"warm_cache.py: {error}", file=sys.stderr)
        return 2
    policy, reward, data = config.policy, config.reward, config.data
    wanted: list[tuple[str, Callable[[], object]]] = [
        ("policy.model", lambda: local_folder(policy.model, policy.revision, "policy.model")),
        *(
            (f"{where}.model", partial(local_folder, each.model, each.revision, f"{where}.model"))
            for where, each in reward.classifiers
        ),
        # Files and S3 need no cache: Ray Data reads from them what each node needs.
        ("data.path", lambda: load_hub(data) if locate(data).kind == "hub" else None),
    ]
    for setting, fetch in wanted:
        began = time.monotonic()
        try:
            fetch()
        except ConfigError as error:
            faults += 1
            print(f"warm_cache.py: {error}", file=sys.stderr)
        else:
            print(f"{setting} is cached ({time.monotonic() - began:.0f} s)")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
