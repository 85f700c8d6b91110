#!/usr/bin/env bash
# Run the linter, the type checker and the tests in .venv, which it creates. Passes arguments to pytest.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/test.sh [ARGUMENTS OF pytest]

Makes .venv in the checkout (once), installs ray-detox with its extras `dev` and `judge` at
the tested versions (once), then runs ruff, mypy and pytest, even if one of them fails.

  bash scripts/test.sh                          everything
  bash scripts/test.sh tests/test_ppo.py -x     one file, to the first failure
  bash scripts/test.sh -m "not ray"             without the tests that start Ray

The tests run in two processes: one runs most tests that start Ray, and both run the others. If an
argument names a file, a folder or a test, pytest uses a single process, as debugging needs it;
`-n 0` asks for that, too.
USAGE
  exit
fi

export RAY_AUTH_MODE=disabled                # a cluster for one test needs no token
export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2 # saves seconds per report
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$ROOT/tests/startup${PYTHONPATH:+:$PYTHONPATH}" # a sixth less CPU time

timings="" failed=""

# phase NAME COMMAND...: run a command, and record its time and whether it passed.
phase() {
  local name=$1 start=$SECONDS
  shift
  "$@" || failed+="${failed:+, }$name"
  timings+="$name $((SECONDS - start)) s | "
}

make_venv
install dev,judge
timings="environment $SECONDS s | "

cd -- "$ROOT"
bin=$VENV/bin
workers=(-n 2) # tests/groups.py divides the tests between them
for word in "$@"; do
  [[ ! -e ${word%%::*} ]] || workers=(-n 0)
done
say "lint: ruff (a second)"
phase lint "$bin/python" -m ruff check .
phase format "$bin/python" -m ruff format --check .
say "types: mypy (15 seconds, less when run again)"
phase types "$bin/python" -m mypy
say "tests: pytest (some minutes)"
phase tests "$bin/python" -m pytest "${workers[@]}" "$@"

say "${timings}all $SECONDS s"
[[ -z $failed ]] || die "These did not pass: $failed. Their output above says where (ruff fixes most of" \
  "lint and format: .venv/bin/ruff check --fix . && .venv/bin/ruff format .)."
say "All passed."
