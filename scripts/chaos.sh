#!/usr/bin/env bash
# Runs with random faults in processes, nodes and storage, reproducible from a seed.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/chaos.sh [--seeds N] [--first SEED] [--workers same|fewer] [--limit SECONDS]

Starts several Ray nodes on this machine and runs N short runs on them (default 40), about a
minute each on 2 cores. One to three faults per run hit workers, reward actors, nodes, drivers,
all of Ray, checkpoints or storage. Prints for each run which faults were injected and whether its
result equals that of the undisturbed run. A wrong run leaves chaos-seed-N.log in this folder;
repeat it with its seed.
USAGE
  exit
fi

make_venv
install dev,judge
PYTHONPATH=$ROOT exec "$VENV/bin/python" -m tests.chaos.long "$@"
