#!/usr/bin/env bash
# Install ray-detox from a fresh checkout and run a recipe. Needs only Python; can be run again.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/quickstart.sh [ARGUMENTS OF ray-detox run]

Creates .venv in the checkout (once), installs ray-detox and its dependencies at the tested
versions (once), and runs `ray-detox run ARGUMENTS`. Without arguments it runs the recipe `lab`,
whose models and data come with the package: no GPU, no account, no download.

  bash scripts/quickstart.sh                                    a few minutes on 2 cores
  bash scripts/quickstart.sh lab train.steps=12                 shorter
  bash scripts/quickstart.sh flan-t5-base --output results/     FLAN-T5 on dialogsum

PYTHON=/path/to/python3.12 selects the Python (3.11 to 3.13). For a CUDA build of torch, create
.venv yourself and first install the version named in constraints.txt into it. The settings of pip
(an index, a proxy) apply.
USAGE
  exit
fi

make_venv
install ""

say "run: ray-detox run${*:+ $*} (the recipe lab takes some minutes on 2 cores)"
status=0
"$VENV/bin/ray-detox" run "$@" || status=$?
case $status in
  0) ;;        # ray-detox printed the paths
  2) exit 2 ;; # invalid settings; ray-detox named the mistake
  *) say "The run failed or was stopped (exit code $status); see the lines above." >&2 ;;
esac
say "ray-detox is '$VENV/bin/ray-detox'; to call it by name: source '$VENV/bin/activate'"
exit "$status"
