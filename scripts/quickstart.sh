#!/usr/bin/env bash
# From a fresh checkout to a run and its report. Needs a Python and nothing else; can be run again.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/quickstart.sh [ARGUMENTS OF ray-detox run]

Makes .venv in the checkout (once), installs ray-detox and what it needs at the tested
versions (once), and runs `ray-detox run ARGUMENTS`. Without arguments that is the recipe
`lab`: models and data that come with the package, no GPU, no account, no download.

  bash scripts/quickstart.sh                                    a few minutes on 2 cores
  bash scripts/quickstart.sh lab train.steps=12                 shorter
  bash scripts/quickstart.sh flan-t5-base --output results/     FLAN-T5 on dialogsum

PYTHON=/path/to/python3.12 picks the Python (3.11 to 3.13). For a CUDA build of torch, make
.venv and install the version that constraints.txt names in it first. pip's own settings
(an index, a proxy) are honoured.
USAGE
  exit
fi

make_venv
install ""

say "run: ray-detox run${*:+ $*} (the recipe lab takes some minutes on 2 cores)"
status=0
"$VENV/bin/ray-detox" run "$@" || status=$?
case $status in
  0) ;;        # ray-detox has said what is where
  2) exit 2 ;; # a mistake in what was asked, and ray-detox has said which
  *) say "The run ended early (exit code $status); the lines above say why." >&2 ;;
esac
say "ray-detox is '$VENV/bin/ray-detox'; to have it by name: source '$VENV/bin/activate'"
exit "$status"
