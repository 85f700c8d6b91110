"""Reward functions in the protocol of TRL's trainers: find them, and call them on a batch.

    f(prompts=[B], completions=[B], completion_ids=[B], **columns) -> [B] numbers or None

A function may be a coroutine function, an object with `__call__`, or a partial. It gets the keywords
that it names, and all of them if it has `**kwargs`. Prompts and completions are texts, not messages.
"""

import asyncio
import importlib
import inspect
import os
import re
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_detox.config import ConfigError, RewardTerm
from ray_detox.recipes.loading import FOLDERS_VARIABLE, make_importable
from ray_detox.records import ScoreRequest

PACKAGE = Path(__file__).parents[1]

RewardFunction = Callable[..., Any]
"""TRL's protocol: keywords `prompts`, `completions`, `completion_ids` and the data's columns, each
[B]; returns one number per completion, or None if it does not apply to that sample. May be async."""

BATCH_KEYWORDS = ("prompts", "completions", "completion_ids")
"""Keywords that hold the batch."""
LOGGING_KEYWORDS = ("log_extra", "log_metric")
"""Callables that TRL passes for logging. A function that names one gets one that does nothing."""
TRAINER_KEYWORDS = ("trainer_state", "environments")
"""Objects of TRL's trainers, which do not exist here."""
RESERVED_COLUMNS = frozenset((*BATCH_KEYWORDS, *LOGGING_KEYWORDS, *TRAINER_KEYWORDS))
"""Columns of the data that functions do not receive, because the keyword has another meaning."""


def load_reward_function(term: RewardTerm) -> RewardFunction:
    """Import the function that a term names; call it with the term's arguments if it has any.

    Raises:
        ConfigError: the import or the call fails, the result is not callable, or it needs an object
            that only TRL's trainers have.
    """
    assert term.function is not None, "the term is a classifier"
    for folder in os.environ.get(FOLDERS_VARIABLE, "").split(
        os.pathsep
    ):  # in a process that Ray started
        if folder:
            make_importable(Path(folder))
    module, _, name = term.function.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a person's module raises
        raise ConfigError(
            f"reward.terms: {term.function} cannot be imported ({_describe(error)}). Give the import "
            "path of a function that every node can import: of a module beside the recipe, in the current "
            "folder or in PYTHONPATH; submit sends it with --with."
        ) from error
    if term.arguments is None:
        if inspect.isclass(found):
            raise ConfigError(
                f"reward.terms: {term.function} is a class, and a reward function is called with a "
                "batch. To create an object of it, add arguments: {}."
            )
    else:
        try:
            found = found(**term.arguments)
        except Exception as error:  # whatever a person's factory raises
            raise ConfigError(
                f"reward.terms: {term.function} refuses its arguments {term.arguments}: "
                f"{_describe(error)}."
            ) from error
    if not callable(found):
        raise ConfigError(f"reward.terms: {term.function} is not a function.")
    _check_signature(found, term)
    return found


def _describe(error: Exception) -> str:
    """Return an error's type and its message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")


def _check_signature(function: RewardFunction, term: RewardTerm) -> None:
    parameters = _parameters(function)
    for name, parameter in (parameters or {}).items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward.terms: {term.function} takes {name!r} by position only, and reward functions "
                "are called by keyword. Write f(completions, **columns)."
            )
        if name in TRAINER_KEYWORDS and parameter.default is parameter.empty:
            raise ConfigError(
                f"reward.terms: {term.function} needs {name!r}, which only TRL's trainers have. Give "
                f"the parameter a default, such as {name}=None."
            )


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    """Return a function's parameters; None if it does not tell them, as some builtins."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _ignore(*_: object, **__: object) -> None:
    """Stand in for TRL's logging callables."""


def keywords(function: RewardFunction, request: ScoreRequest) -> dict[str, Any]:
    """Return the keywords that a function takes of a batch."""
    # Copies, so that a function may change what it gets.
    found: dict[str, Any] = {
        name: list(values)
        for name, values in request.columns.items()
        if name not in RESERVED_COLUMNS
    } | {
        "prompts": list(request.prompts),
        "completions": list(request.responses),
        "completion_ids": [list(row) for row in request.response_ids],
    }
    parameters = _parameters(function)
    if parameters is None:
        return found
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        found = {name: value for name, value in found.items() if name in parameters}
    return found | {name: _ignore for name in LOGGING_KEYWORDS if name in parameters}


class FunctionCaller:
    """Calls reward functions, and runs those that are async at the same time.

    One event loop for the life of the object, so that an async function can keep a connection. It
    runs in a thread of its own, because the caller's thread may run a loop already, as in Jupyter.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(
        self, functions: Sequence[tuple[RewardTerm, RewardFunction]], request: ScoreRequest
    ) -> list[np.ndarray]:
        """Return the values of each function, [B] float32, with 0 in place of None.

        Raises:
            ValueError: a function did not return one finite number per response.
            Exception: what a function raised, with the term's name as a note.
        """
        outputs = []
        for term, function in functions:
            with _noting(term):
                outputs.append(function(**keywords(function, request)))
        pending = [i for i, output in enumerate(outputs) if inspect.isawaitable(output)]
        if pending:
            if self._loop is None:
                self._loop = _start_loop()
                # The thread holds the loop and not this object, and ends with it.
                weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
            calls = [_await(functions[i][0], outputs[i]) for i in pending]
            done = asyncio.run_coroutine_threadsafe(_gather(calls), self._loop).result()
            for i, output in zip(pending, done, strict=True):
                outputs[i] = output
        values = []
        for (term, _), output in zip(functions, outputs, strict=True):
            with _noting(term):
                values.append(_as_array(term, output, len(request)))
        return values


def _start_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs in a new thread until it is stopped."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_forever()
        finally:
            loop.close()

    threading.Thread(target=run, name="async-reward-functions", daemon=True).start()
    return loop


@contextmanager
def _noting(term: RewardTerm) -> Iterator[None]:
    """Add the term's name and the traceback to an error as notes, which it keeps on its way to the driver."""
    try:
        yield
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        error.add_note(term.name)
        error.add_note(text)
        raise


@dataclass(frozen=True, slots=True)
class FunctionFailure:
    """What is known of an error that a reward function raised."""

    term: str
    """Name of the reward term."""
    traceback: str
    where: str
    """File and line in the user's code, such as `/home/me/my_rewards.py, line 7`; empty if unknown."""


def failure_of(error: BaseException) -> FunctionFailure | None:
    """Return what the notes of an error say of the reward function that raised it; None if none did."""
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    if len(notes) < 2 or "Traceback" not in notes[1]:
        return None
    frames = re.findall(r'^ +File "(.+)", (line \d+)', notes[1], re.MULTILINE)
    own = [(file, line) for file, line in frames if Path(file).parents[1] != PACKAGE]
    return FunctionFailure(notes[0], notes[1], ", ".join(own[-1]) if own else "")


async def _await(term: RewardTerm, output: Awaitable[Any]) -> Any:
    with _noting(term):
        return await output


async def _gather(pending: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*pending))


def _as_array(term: RewardTerm, output: Any, count: int) -> np.ndarray:
    try:
        if isinstance(output, str | bytes | Mapping | Set):
            raise TypeError("its items are not one number per response, in their order")
        # None means "not applicable to this sample" in that protocol, and adds nothing.
        value = np.array([0.0 if v is None else float(v) for v in output], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward term {term.name} returned {type(output).__name__} ({error}); expected a list "
            "with one finite number per response."
        ) from error
    if value.shape != (count,) or not np.isfinite(value).all():
        raise ValueError(
            f"The reward term {term.name} returned {value.shape[0]} values for "
            f"{count} responses, or a value that is not a finite number; expected "
            "one finite number per response."
        )
    return value
