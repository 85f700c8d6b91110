"""The protocol of result stores, and the names that every store agrees on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ray_detox.store.errors import StoreError
from ray_detox.store.pages import Page, SampleQuery

SCHEMA = 2
"""Version of what is stored; a reader refuses versions that it does not know."""


SUMMARY_KEYS = ("run_id", "recipe", "status", "created", "n", "verdict", "toxicity")
"""What every report must have, and what a list of runs shows."""


_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ResultStore(Protocol):
    """Keeps the report of each run, its samples and its training curves.

    Example: what a run stores, much shortened.

        report   {"run_id": "first", "recipe": "lab", "created": "2026-01-31T12:00:00+00:00",
                  "n": 512, "toxicity": {"before": {"mean": 0.41, ...}, ...}, ...}
        samples  [{"index": 0, "query": "...", "response_before": "...", "kl": 1.2, ...}, ...]
        curves   [{"step": 1, "score": 0.48, "kl": 0.0, ...}, ...]
    """

    def put_run(
        self,
        report: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        curves: Sequence[Mapping[str, Any]] = (),
        *,
        overwrite: bool = False,
        attempt: str | None = None,
    ) -> bool:
        """Store a run, whole or not at all.

        Args:
            report: JSON values under string keys, with at least `SUMMARY_KEYS`; no NaN.
            samples: JSON values under string keys, each with its own `index`. A number that is
                not finite is stored as None, and its name is added to the sample's `invalid`.
            curves: the figures of each training step. A number that is not finite becomes None.
            overwrite: replace a run of the same id, samples included.
            attempt: a name of this writer. An attempt of the same name, such as a task that is
                run again after a crash, may write again what it had written.

        Returns:
            True, or False where the very same run was stored already: then nothing is written.

        Raises:
            StoreError: something cannot be stored, the run exists, or the store failed.
        """
        ...

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """The report as it was put; None where there is no such finished run."""
        ...

    def list_runs(self) -> list[dict[str, Any]]:
        """Of each finished run the `SUMMARY_KEYS` of its report, less the histogram; newest first."""
        ...

    def list_page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """The same in pages.

        Raises:
            BadCursor: the cursor is not from an earlier page.
        """
        ...

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The samples of a finished run by index; nothing where there is no such run."""
        ...

    def get_sample(self, run_id: str, index: int) -> dict[str, Any] | None:
        """One sample in full; None where there is none."""
        ...

    def sample_page(
        self,
        run_id: str,
        query: SampleQuery = SampleQuery(),  # noqa: B008 - frozen
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page | None:
        """Samples that answer a query, with `toxicity_diff` and `reward_diff`.

        A page may be short, even empty, and still not be the last: the work for one is bounded.
        Where a store cuts a very long text here, `overflow` has its name; `get_sample` has it whole.

        Returns:
            None where there is no such finished run.

        Raises:
            BadCursor: the cursor is not from an earlier page of the same run and query.
        """
        ...

    def get_history(self, run_id: str) -> list[dict[str, Any]]:
        """The figures of each training step; none where there is no such run."""
        ...

    def check(self) -> None:
        """Find out now, and not after hours of training, whether a run could be stored.

        Raises:
            StoreError: what is missing, and what to do.
        """
        ...

    def close(self) -> None:
        """Let go of connections; the store opens new ones when it is used again."""
        ...


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it can name a run in every store, a file and a URL.

    Raises:
        StoreError: it has other characters than letters, digits, `.`, `_` and `-`, does not
            start with a letter or digit, or has more than 64 characters.
    """
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise StoreError(
            f"Run id {str(run_id)[:80]!r} cannot be used. Take 1 to 64 letters, digits, '.', '_' "
            "and '-', starting with a letter or digit."
        )
    return run_id
