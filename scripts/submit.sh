#!/usr/bin/env bash
# Submit a run to a cluster and follow it: prepares .venv, then calls `ray-detox submit`.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/submit.sh [RECIPE] [section.name=value ...] [--run-id ID] [--output DIR]
                              [--with PATH] [--env NAME=VALUE] [--no-wait] [--address URL]
       bash scripts/submit.sh --resume RUN [section.name=value ...] [...]
       bash scripts/submit.sh --follow RUN | --stop RUN

Sends the package of this checkout and the settings to a cluster's job server, prints the run id and
then the log, and exits with the exit code of the run (143: stopped). Ctrl-C stops reading the log;
the run continues. The default cluster has its dashboard at http://127.0.0.1:8265: start it with
scripts/head.sh, or reach one through `ray dashboard cluster/aws.yaml`.

  bash scripts/submit.sh lab                                     the embedded models
  bash scripts/submit.sh my-run.yaml --with my_rewards.py        your own recipe and reward function
  bash scripts/submit.sh --resume lab-20260102-030405-abcd       continue a run that was stopped
USAGE
  exit
fi

make_venv >&2
install "" >&2
export RAY_DETOX_SUBMIT="bash scripts/submit.sh"
exec "$VENV/bin/ray-detox" submit "$@"
