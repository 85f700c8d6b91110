#!/usr/bin/env bash
# A Ray of this machine, to submit jobs to; in the foreground, Ctrl-C ends it. Arguments as below.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/head.sh [ARGUMENTS OF ray start]

Starts the head of a Ray cluster and stays in the foreground; then, in another terminal:

  bash scripts/submit.sh lab

The dashboard, and with it the job server, listens on this machine only; Ray's other ports are open
to the network and ask for the token in ~/.ray/auth_token, which the first start makes. With that
file and this checkout installed, another machine joins with

  RAY_AUTH_MODE=token .venv/bin/ray start --block --address=ADDRESS:6379
USAGE
  exit
fi

make_venv
install ""
# Whoever reaches a head can run programs as you, other users of this machine included; so it asks
# for a token, which scripts/submit.sh reads from the same file.
export RAY_AUTH_MODE=token
[[ -n ${RAY_AUTH_TOKEN:-} ]] || "$VENV/bin/ray" get-auth-token --generate >/dev/null
# Jobs say `python`. CPUs are counted, not bound: a machine with few runs what a larger one would.
export PATH=$VENV/bin:$PATH
cpus=$("$VENV/bin/python" -c 'import os; print(max(os.cpu_count() or 1, 4))')
exec "$VENV/bin/ray" start --head --block --disable-usage-stats --dashboard-host=127.0.0.1 \
  --num-cpus="$cpus" --dashboard-agent-listen-port=0 "$@"
