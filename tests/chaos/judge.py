"""Whether a run that was disturbed is the run that was not."""

import math
from typing import Any

from ray_detox.store.sqlite import SQLiteStore
from tests.chaos.harness import MEASURED, STEPS, Chaos, Ended

SAME = ["train.workers=2", "reward.actors=2"]
"""The same number of workers whatever happens: equal to the last bit."""
FEWER = ["train.workers=1..3", "cluster.upscale_delay_s=1", "reward.actors=1"]
"""On nodes of 2 CPUs as many workers as fit: equal but for rounding."""


def faults(found: Chaos, run_id: str, calm_id: str, ended: Ended, exact: bool) -> list[str]:
    """What is wrong with a run that has ended; nothing where all is well."""
    if ended.codes[-1] != 0:
        return [f"exit codes {ended.codes}: {ended.said[-1] if ended.said else 'nothing said'}"]
    wrong = []
    rows, calm = found.rows(run_id), found.rows(calm_id)
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        wrong.append(f"steps {[row['step'] for row in rows]}")
    elif not (rows == calm if exact else all(map(_close, rows, calm))):
        wrong.append("figures differ")
    samples, undisturbed = found.samples(run_id), found.samples(calm_id)
    if [sample["index"] for sample in samples] != list(range(MEASURED)):
        wrong.append("samples are lost or doubled")
    if exact and samples != undisturbed:
        wrong.append("samples differ")
    if exact and found.adapter(run_id) != found.adapter(calm_id):
        wrong.append("the adapter differs")
    store = SQLiteStore(found.folder / "runs/results.sqlite")
    if [run["run_id"] for run in store.list_runs()].count(run_id) != 1:
        wrong.append("it is not stored once")
    if sum(1 for _ in store.get_samples(run_id)) != MEASURED:
        wrong.append("its samples are not stored once")
    return wrong


def _close(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Figures of one step, by workers in other numbers: rounding may flip a token, no more."""
    return all(
        math.isclose(row[name], other[name], rel_tol=0.15, abs_tol=0.25)
        for name in ("score", "toxicity", "kl", "length", "entropy")
    )
