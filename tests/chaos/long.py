"""Many runs, each with a schedule of its own from a seed; a line for each, and how many were wrong.

bash scripts/chaos.sh --seeds 40 --first 0
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.harness import STEPS, Chaos, chaos
from tests.chaos.judge import FEWER, SAME, faults
from tests.chaos.schedule import schedule

DOCUMENTED = ("Training failed", "The run needs", "could not be kept", "No scores for")
"""How the sentences begin that a run may end with."""


def main() -> int:
    """Run the schedules; 1 where one was wrong."""
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
            chaos(Path(name), cpus=cpus) as house,
        ):
            ended = house.go("calm", settings, limit_s=args.limit)
            print(f"calm, {settings[0]}: {ended.codes}, {ended.seconds:.0f} s", flush=True)
            wrong += sum(_is_wrong(house, seed, settings, exact, args.limit) for seed in of_these)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


def _is_wrong(house: Chaos, seed: int, settings: list[str], exact: bool, limit_s: float) -> bool:
    """Run one schedule and print its line."""
    run_id, blows = f"seed-{seed}", schedule(seed, STEPS)
    try:
        ended = house.go(run_id, settings, blows, limit_s=limit_s, seed=seed)
    except TimeoutError as error:
        print(f"{run_id} | {', '.join(map(str, blows))} | HANGS: {error}", flush=True)
        return True
    bad = faults(house, run_id, "calm", ended, exact)
    said = [line for line in ended.said[-3:] if any(start in line for start in DOCUMENTED)]
    if ended.codes[-1] != 0 and said:
        bad, outcome = [], f"ended with its sentence: {said[0]}"
    else:
        outcome = "; ".join(bad) or ("equal" if exact else "close")
    happened = ", ".join(ended.happened)
    print(
        f"{run_id} | {happened} | codes {ended.codes} | {ended.seconds:.0f} s | {outcome}",
        flush=True,
    )
    if bad:
        (Path.cwd() / f"chaos-{run_id}.log").write_text(ended.text)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
