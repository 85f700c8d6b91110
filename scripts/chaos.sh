#!/usr/bin/env bash
# Run jobs that lose processes, nodes and storage, each on a schedule from a seed. See --help.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/chaos.sh [--seeds N] [--first SEED] [--workers same|fewer] [--limit SECONDS]

Starts a Ray cluster of several nodes on this machine, and N short runs on it (default 40), about a
minute each on 2 cores. Each run suffers one to three faults: of workers, reward actors, nodes,
drivers, all of Ray, checkpoints or storage. Prints the faults of each run, and whether its result
equals that of an undisturbed run. If not, the run leaves chaos-seed-N.log in this folder; its seed
repeats the same faults.
USAGE
  exit
fi

make_venv
install dev,judge
PYTHONPATH=$ROOT exec "$VENV/bin/python" -m tests.chaos.long "$@"
