#!/usr/bin/env bash
# On a spot instance, waits for AWS's notice that it takes the instance back (two minutes ahead), and makes
# Ray drain this node: a run finishes its step, saves a checkpoint and continues elsewhere. On other
# instances this script ends at once. cluster/aws.yaml starts it on every worker, in the container.
set -uo pipefail

IMDS=${RAY_DETOX_IMDS:-http://169.254.169.254} # metadata of the instance; tests use another address
POLL_S=${RAY_DETOX_SPOT_POLL_S:-5}             # AWS recommends 5 seconds
MARGIN_S=10                                    # left for the processes to end

# Only one at a time: `ray up` starts Ray, and so this script, again. The lock ends with the process.
exec 9>"${RAY_DETOX_SPOT_LOCK:-/tmp/ray-detox-spot-watch.lock}"
flock --nonblock 9 || exit 0

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }

# metadata PATH: print the value; fails if there is none (404). Uses wget, because Ray's image has no curl.
metadata() {
  local token
  token=$(wget -qO- --tries=1 --timeout=2 --method=PUT \
    --header='X-aws-ec2-metadata-token-ttl-seconds: 60' "$IMDS/latest/api/token") || return
  wget -qO- --tries=1 --timeout=2 --header="X-aws-ec2-metadata-token: $token" \
    "$IMDS/latest/meta-data/$1"
}

# Print the current id of this machine's Ray node; it changes when Ray starts again.
node_id() {
  python -c 'import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().get_node_id())' 2>/dev/null | tail -n 1
}

# seconds_left NOTICE: seconds until the time in the notice, minus the margin; 100 if it has no time.
seconds_left() {
  local at left=100
  at=$(sed -n 's/.*"time" *: *"\([^"]*\)".*/\1/p' <<<"$1")
  [[ -n $at ]] && at=$(date -u -d "$at" +%s 2>/dev/null) && left=$((at - $(date +%s) - MARGIN_S))
  echo $((left > 1 ? left : 1))
}

# Without an answer this may still be a spot instance; only a different answer ends the script.
while [[ ${kind:=$(metadata instance-life-cycle)} != spot ]]; do
  [[ -z $kind ]] || exit 0
  sleep "$POLL_S"
done
say "watching for the notice that AWS takes this spot instance back"

until notice=$(metadata spot/instance-action); do sleep "$POLL_S"; done
say "notice: $notice"
# Repeated until it succeeds, because Ray may not have started yet.
until ray drain-node --node-id "$(node_id)" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "EC2 takes this spot instance back" \
  --deadline-remaining-seconds "$(seconds_left "$notice")"; do
  sleep 1
done
say "Ray drains this node"
