"""Run many random fault schedules; print a line for each and the number of wrong results.

bash scripts/chaos.sh --seeds 40 --first 0
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.compare import FEWER, SAME, differences
from tests.chaos.harness import STEPS, Chaos, chaos
from tests.chaos.schedule import schedule

DOCUMENTED = ("Training failed", "The run needs", "could not be kept", "No scores for")
"""Beginnings of the documented messages with which a run may fail."""


def main() -> int:
    """Run the schedules; return 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--workers",
        choices=("both", "same", "fewer"),
        default="both",
        help="even seeds keep the number of workers, odd ones do not; run only these",
    )
    parser.add_argument("--limit", type=float, default=400, help="seconds a run may take at most")
    args = parser.parse_args()
    wrong = 0
    seeds = range(args.first, args.first + args.seeds)
    for settings, cpus, of_these, exact in (
        (SAME, 4, [seed for seed in seeds if seed % 2 == 0], True),
        (FEWER, 2, [seed for seed in seeds if seed % 2], False),
    ):
        if not of_these or args.workers not in ("both", "same" if exact else "fewer"):
            continue
        with (
            tempfile.TemporaryDirectory(prefix="chaos-") as name,
            chaos(Path(name), cpus=cpus) as nodes,
        ):
            outcome = nodes.run("calm", settings, limit_s=args.limit)
            print(f"calm, {settings[0]}: {outcome.codes}, {outcome.seconds:.0f} s", flush=True)
            wrong += sum(_is_wrong(nodes, seed, settings, exact, args.limit) for seed in of_these)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


def _is_wrong(nodes: Chaos, seed: int, settings: list[str], exact: bool, limit_s: float) -> bool:
    """Run one schedule and print its line; True if the result is wrong."""
    run_id, faults = f"seed-{seed}", schedule(seed, STEPS)
    try:
        outcome = nodes.run(run_id, settings, faults, limit_s=limit_s, seed=seed)
    except TimeoutError as error:
        print(f"{run_id} | {', '.join(map(str, faults))} | HANGS: {error}", flush=True)
        return True
    bad = differences(nodes, run_id, "calm", outcome, exact)
    messages = [line for line in outcome.lines[-3:] if any(start in line for start in DOCUMENTED)]
    if outcome.codes[-1] != 0 and messages:
        bad, verdict = [], f"ended with a documented message: {messages[0]}"
    else:
        verdict = "; ".join(bad) or ("equal" if exact else "close")
    injected = ", ".join(outcome.injected)
    print(
        f"{run_id} | {injected} | codes {outcome.codes} | {outcome.seconds:.0f} s | {verdict}",
        flush=True,
    )
    if bad:
        (Path.cwd() / f"chaos-{run_id}.log").write_text(outcome.text)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
