#!/usr/bin/env bash
# Runs that lose processes, nodes and storage, each on a schedule from a seed. Arguments as below.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/chaos.sh [--seeds N] [--first SEED] [--workers same|fewer] [--limit SECONDS]

A Ray of several nodes on this machine; N short runs on it (40 unless said), about a minute each
on 2 cores, disturbed by one to three blows: workers, reward actors, nodes, drivers, all of Ray,
checkpoints, storage. Prints what happened to each and whether it ended as the run that was not
disturbed did. A run that did not is seen again with its seed, and leaves chaos-seed-N.log here.
USAGE
  exit
fi

make_venv
install dev,judge
PYTHONPATH=$ROOT exec "$VENV/bin/python" -m tests.chaos.long "$@"
