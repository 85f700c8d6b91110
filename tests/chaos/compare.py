"""Compare a run with injected faults with an undisturbed one."""

import math
from typing import Any

from ray_detox.store.sqlite import SQLiteStore
from tests.chaos.harness import MEASURED, STEPS, Chaos, RunOutcome

SAME = ["train.workers=2", "reward.actors=2"]
"""A constant number of workers: results are bit-identical."""
FEWER = ["train.workers=1..3", "cluster.upscale_delay_s=1", "reward.actors=1"]
"""As many workers as fit on nodes of 2 CPUs: results differ by rounding."""


def differences(
    nodes: Chaos, run_id: str, calm_id: str, outcome: RunOutcome, exact: bool
) -> list[str]:
    """List the differences between a finished run and the undisturbed one."""
    if outcome.codes[-1] != 0:
        return [
            f"exit codes {outcome.codes}: {outcome.lines[-1] if outcome.lines else 'no output'}"
        ]
    wrong = []
    rows, calm = nodes.rows(run_id), nodes.rows(calm_id)
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        wrong.append(f"steps {[row['step'] for row in rows]}")
    elif not (rows == calm if exact else all(map(_close, rows, calm))):
        wrong.append("metrics differ")
    samples, undisturbed = nodes.samples(run_id), nodes.samples(calm_id)
    if [sample["index"] for sample in samples] != list(range(MEASURED)):
        wrong.append("samples are missing or duplicated")
    if exact and samples != undisturbed:
        wrong.append("samples differ")
    if exact and nodes.adapter(run_id) != nodes.adapter(calm_id):
        wrong.append("the adapter differs")
    store = SQLiteStore(nodes.folder / "runs/results.sqlite")
    if [run["run_id"] for run in store.list_runs()].count(run_id) != 1:
        wrong.append("the run is not stored exactly once")
    if sum(1 for _ in store.get_samples(run_id)) != MEASURED:
        wrong.append("its samples are not stored exactly once")
    return wrong


def _close(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare metrics of a step between different numbers of workers, where rounding may flip a token."""
    return all(
        math.isclose(row[name], other[name], rel_tol=0.15, abs_tol=0.25)
        for name in ("score", "toxicity", "kl", "length", "entropy")
    )
