"""Functions that settings name: which of them this user has already run on this machine.

A recipe that a user runs is code, as a Makefile is: `run RECIPE` imports what it names, and notes it
here. A run's folder or storage may come from somebody else, so the functions in its settings are
imported only if the user has run the same functions with the same arguments in that run, or says so.

    run RECIPE                   --remember-->  STATE/ray-detox/functions/HASH    a file for each
    run --resume, evaluate RUN   <--is it there?

A file has the folders that the functions were looked for in, such as that of the recipe: a resume looks there
again. The run's own folder does not say it, because it may be somebody else's.

The hash is of the run's id, the function and its arguments.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from ray_detox.config import RunConfig
from ray_detox.errors import ConfigError
from ray_detox.recipes.loading import FOLDERS_VARIABLE, make_importable

log = logging.getLogger(__name__)

_MOST_CHARACTERS = 200


def named_functions(config: RunConfig) -> list[str]:
    """Describe the functions that the settings of a run name, with their arguments."""
    found = []
    for term in config.reward.terms:
        if term.function is not None:
            arguments = "" if term.arguments is None else json.dumps(term.arguments, sort_keys=True)
            if len(arguments) > _MOST_CHARACTERS:
                arguments = f"{arguments[:_MOST_CHARACTERS]}..."
            found.append(f"{term.function}({arguments})" if arguments else term.function)
    return found


def remember(config: RunConfig, run_id: str) -> None:
    """Note that this user runs the functions of a run on this machine.

    Without a home folder that can be written to, nothing is noted, and a resume needs the flag.
    """
    for file in _files(config, run_id):
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_text(os.environ.get(FOLDERS_VARIABLE, ""))
        except OSError as error:
            log.debug("%s could not be written: %s", file, error)


def require_own(config: RunConfig, run_id: str, *, trust: bool, say: Callable[[str], None]) -> None:
    """Refuse functions of stored settings that this user has not run on this machine.

    Args:
        config: settings that a run's folder or storage holds.
        run_id: of the run.
        trust: the user trusts them; they are named and noted.
        say: shows a line.

    Raises:
        ConfigError: they are unknown, and `trust` is False. Nothing has been imported.
    """
    files = _files(config, run_id)
    if all(file.is_file() for file in files):
        for file in files:
            for folder in filter(None, file.read_text().split(os.pathsep)):
                make_importable(Path(folder))
        return
    names = ", ".join(named_functions(config))
    if not trust:
        raise ConfigError(
            f"The settings of run {run_id!r} name functions that you have not run on this machine: "
            f"{names}. To import them runs code; if you know where the run comes from and trust it, add "
            "--trust-functions (in Python, trust_functions=True)."
        )
    say(f"run {run_id} names functions, which are trusted: {names}")
    remember(config, run_id)


def _files(config: RunConfig, run_id: str) -> list[Path]:
    """Return the file that notes each function of a run."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(
        state
    ):  # a relative one counts as not set (XDG Base Directory Specification)
        state = os.path.expanduser("~/.local/state")
    folder = Path(state) / "ray-detox" / "functions"
    keys = (
        json.dumps([run_id, term.function, term.arguments], sort_keys=True)
        for term in config.reward.terms
        if term.function is not None
    )
    return [folder / hashlib.sha256(key.encode()).hexdigest() for key in keys]
