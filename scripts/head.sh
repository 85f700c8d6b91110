#!/usr/bin/env bash
# Start a Ray head on this machine, to submit jobs to; runs in the foreground. See --help.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/head.sh [ARGUMENTS OF ray start]

Starts the head of a Ray cluster in the foreground (Ctrl-C ends it); then, in another terminal:

  bash scripts/submit.sh lab

The dashboard, which includes the job server, listens on this machine only. Ray's other ports are open to
the network and require the token in ~/.ray/auth_token, which the first start creates. Another
machine with that file and this checkout installed joins with

  RAY_AUTH_MODE=token .venv/bin/ray start --block --address=ADDRESS:6379
USAGE
  exit
fi

make_venv
install ""
# Whoever can connect to a head can run programs as you, including other users of this machine. So it
# requires a token, which scripts/submit.sh reads from the same file.
export RAY_AUTH_MODE=token
[[ -n ${RAY_AUTH_TOKEN:-} ]] || "$VENV/bin/ray" get-auth-token --generate >/dev/null
# Jobs run `python`, so it must be the one in .venv. Ray only counts CPUs and binds no process to them, so
# a small machine can offer 4.
export PATH=$VENV/bin:$PATH
cpus=$("$VENV/bin/python" -c 'import os; print(max(os.cpu_count() or 1, 4))')
exec "$VENV/bin/ray" start --head --block --disable-usage-stats --dashboard-host=127.0.0.1 \
  --num-cpus="$cpus" --dashboard-agent-listen-port=0 "$@"
