"""Names of files and folders in settings, resolved once, in the driver.

    settings as written --absolute_names--> what all processes of a run use, and what is stored
                        <--portable_names-- files that were sent along with a job stay relative

Ray's workers have other current folders than the driver, and a run may be resumed from another folder.
A hub id, an address such as `s3://...` and `lab` stay what they are.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ray_detox.errors import ConfigError

if TYPE_CHECKING:
    from ray_detox.config import ClassifierConfig, RunConfig

JOB_VARIABLE = "RAY_DETOX_JOB"
"""Set in a submitted job: its current folder holds what was sent along, and the next job has another."""


def expand(name: str | os.PathLike[str]) -> Path:
    """Return a path with `~` and `~user` replaced by the home folder.

    Raises:
        ConfigError: there is no such home folder.
    """
    path = os.path.expanduser(os.fspath(name))
    user, slash, _ = path.partition("/")
    if path == "~" or (path.startswith("~") and slash and not os.path.exists(user)):
        who = "this user" if user == "~" else f"a user {user[1:]!r}"
        raise ConfigError(
            f"{os.fspath(name)!r} begins with ~, and {who} has no home folder here. Write the whole path"
            f"{', or set HOME' if user == '~' else ''}."
        )
    return Path(path)


def absolute_names(config: "RunConfig") -> "RunConfig":
    """Return settings in which every file and folder of this machine has its absolute path.

    Raises:
        ConfigError: a name begins with `~`, and there is no home folder.
    """
    return _rename(config, _absolute_existing, _absolute)


def portable_names(config: "RunConfig") -> "RunConfig":
    """Return settings to store: in a submitted job, files in its folder are named relative to it."""
    if not os.environ.get(JOB_VARIABLE):
        return config

    def relative(name: str) -> str:
        here = Path.cwd()
        path = Path(name)
        return str(path.relative_to(here)) if here in path.parents else name

    return _rename(config, relative, lambda name: name)


def _absolute(address: str) -> str:
    return address if "://" in address else os.path.abspath(expand(address))


def _absolute_existing(name: str) -> str:
    """Return the absolute path of a file or folder that exists; a hub id may look like a path."""
    if name == "lab" or "://" in name:
        return name
    path = expand(name)
    return os.path.abspath(path) if name.startswith("~") or path.exists() else name


def _rename(
    config: "RunConfig", source: Callable[[str], str], storage: Callable[[str], str]
) -> "RunConfig":
    def classifier(section: "ClassifierConfig") -> "ClassifierConfig":
        return section.replace(model=source(section.model))

    policy, train, reward = config.policy, config.train, config.reward
    terms = tuple(
        term if term.classifier is None else term.replace(classifier=classifier(term.classifier))
        for term in reward.terms
    )
    return config.replace(
        data=config.data.replace(path=source(config.data.path)),
        policy=policy.replace(
            model=source(policy.model),
            adapter=None if policy.adapter is None else source(policy.adapter),
        ),
        reward=reward.replace(model=source(reward.model), terms=terms),
        train=train.replace(storage=None if train.storage is None else storage(train.storage)),
    )
