#!/usr/bin/env bash
# Start a Ray head on this machine, to submit jobs to, or join one; runs in the foreground. See --help.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: bash scripts/head.sh [ARGUMENTS OF ray start]

Starts the head of a Ray cluster in the foreground (Ctrl-C ends it); then, in another terminal:

  bash scripts/submit.sh lab

The dashboard, which includes the job server, listens on this machine only. Ray's other ports are open to
the network. All of them require the token in ~/.ray/auth_token, which the first start creates. Ray's
files are in TMPDIR/ray-UID (/tmp by default), which other users cannot enter. Nothing is encrypted: use a
network that you trust. Another machine with that token and this checkout joins with

  bash scripts/head.sh --address=ADDRESS:6379
USAGE
  exit
fi

make_venv
install ""
# Whoever can connect to a head, or replace the files that it unpacks, can run programs as you. So it
# requires a token, which scripts/submit.sh reads from the same file, and its files are in a private folder.
umask 077
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
  "$VENV/bin/ray" get-auth-token --generate >/dev/null
  [[ -n ${RAY_AUTH_TOKEN_PATH:-} ]] || chmod go-rwx ~/.ray/auth_token # it may be older than this umask
fi
temp=$("$VENV/bin/python" -m ray_detox.stages.cluster.private) || exit 1
# Jobs run `python`, so it must be the one in .venv. Ray only counts CPUs and binds no process to them, so
# a small machine can offer 4.
export PATH=$VENV/bin:$PATH
cpus=$("$VENV/bin/python" -c 'from ray_detox.machine import cpu_count; print(max(cpu_count(), 4))')
start=("$VENV/bin/ray" start --block --disable-usage-stats --temp-dir="$temp" --num-cpus="$cpus")
if [[ " $*" == *" --address"* ]]; then
  exec "${start[@]}" "$@"
fi
exec "${start[@]}" --head --dashboard-host=127.0.0.1 --dashboard-agent-listen-port=0 "$@"
