"""The protocol of result stores, and the names that all stores share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ray_detox.store.errors import StoreError
from ray_detox.store.pages import Page, SampleQuery

SCHEMA = 2
"""Version of the stored format; a reader refuses newer versions."""

SUMMARY_KEYS = ("run_id", "recipe", "status", "created", "n", "verdict", "toxicity")
"""Names that every report must have; a list of runs shows them."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ResultStore(Protocol):
    """Keeps the report, the samples and the training history of each run.

    Every reader sees a run only once it is complete.

    Example of a stored run, shortened:

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
        """Store a run atomically.

        Args:
            report: JSON values under string keys, with at least `SUMMARY_KEYS`; no NaN.
            samples: JSON values under string keys, each with its own `index`. A number that is
                not finite is stored as None, and its name is added to the sample's `invalid`.
            curves: the metrics of each training step. A number that is not finite becomes None.
            overwrite: replace a run of the same id, including its samples.
            attempt: name of this writer. A later attempt of the same name, such as a task that Ray
                runs again after a crash, may replace what the earlier one wrote.

        Returns:
            True; False if the same run was stored already, in which case nothing is written.

        Raises:
            StoreError: a value cannot be stored, another run has this id, a later process of the same
                run has stored it (`writer` of its report has a larger token, also with `overwrite`),
                or the store failed.
        """
        ...

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """Return the report of a complete run as it was stored; None if there is no such run."""
        ...

    def list_runs(self) -> list[dict[str, Any]]:
        """Return `SUMMARY_KEYS` of the report of each complete run, newest first.

        Runs from the future, as the reader's clock says, come last. The toxicity lacks its histogram.
        """
        ...

    def list_page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """Return one page of `list_runs`.

        Raises:
            BadCursor: the cursor does not come from an earlier page.
        """
        ...

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """Return the samples of a complete run by index; none if there is no such run."""
        ...

    def get_sample(self, run_id: str, index: int) -> dict[str, Any] | None:
        """Return one sample in full; None if it does not exist."""
        ...

    def sample_page(
        self,
        run_id: str,
        query: SampleQuery = SampleQuery(),  # noqa: B008 - frozen
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page | None:
        """Return one page of the samples that match a query, with `toxicity_diff`, `reward_diff`.

        A page may be short, or even empty, and still not be the last, because the work for one
        page is bounded. If a store shortens a very long text, the sample's `overflow` names it, and
        `get_sample` returns it in full.

        Returns:
            The page; None if there is no such complete run.

        Raises:
            BadCursor: the cursor does not come from an earlier page of the same run and query.
        """
        ...

    def get_history(self, run_id: str) -> list[dict[str, Any]]:
        """Return the metrics of each training step; none if there is no such run."""
        ...

    def check(self) -> None:
        """Check that a run can be stored, so that a mistake shows before hours of training.

        Raises:
            StoreError: it cannot; the message says what is missing and what to do.
        """
        ...

    def close(self) -> None:
        """Close connections; the store opens new ones when it is used again."""
        ...


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it is valid in every store, as a file name and in a URL.

    Raises:
        StoreError: it has characters other than letters, digits, `.`, `_` and `-`, does not
            start with a letter or digit, or has more than 64 characters.
    """
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise StoreError(
            f"Run id {str(run_id)[:80]!r} cannot be used. Take 1 to 64 letters, digits, '.', '_' "
            "and '-', starting with a letter or digit."
        )
    return run_id
