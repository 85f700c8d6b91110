#!/usr/bin/env bash
# On a spot instance, waits for AWS's notice that it is to go (two minutes ahead) and has Ray drain
# this node: a run ends its step, keeps a checkpoint and goes on elsewhere. On other instances it
# ends at once. Started on every worker by cluster/aws.yaml, in the container, beside Ray.
set -uo pipefail

IMDS=${RAY_DETOX_IMDS:-http://169.254.169.254} # the instance's metadata; another address in tests
POLL_S=${RAY_DETOX_SPOT_POLL_S:-5}             # AWS advises 5 seconds
MARGIN_S=10                                    # kept for the processes to end in

# One at a time: `ray up` starts Ray again, and this with it. The lock goes with the process.
exec 9>"${RAY_DETOX_SPOT_LOCK:-/tmp/ray-detox-spot-watch.lock}"
flock --nonblock 9 || exit 0

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }

# metadata PATH: what is there. Fails where nothing is (404). wget, for Ray's image has no curl.
metadata() {
  local token
  token=$(wget -qO- --tries=1 --timeout=2 --method=PUT \
    --header='X-aws-ec2-metadata-token-ttl-seconds: 60' "$IMDS/latest/api/token") || return
  wget -qO- --tries=1 --timeout=2 --header="X-aws-ec2-metadata-token: $token" \
    "$IMDS/latest/meta-data/$1"
}

# The id that this machine's Ray node has now; it is another one after Ray was started again.
node_id() {
  python -c 'import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().get_node_id())' 2>/dev/null | tail -n 1
}

# seconds_left NOTICE: until the time that the notice names, less the margin; 100 if it names none.
seconds_left() {
  local at left=100
  at=$(sed -n 's/.*"time" *: *"\([^"]*\)".*/\1/p' <<<"$1")
  [[ -n $at ]] && at=$(date -u -d "$at" +%s 2>/dev/null) && left=$((at - $(date +%s) - MARGIN_S))
  echo $((left > 1 ? left : 1))
}

# Without an answer it may still be a spot instance: only another answer ends this.
while [[ ${kind:=$(metadata instance-life-cycle)} != spot ]]; do
  [[ -z $kind ]] || exit 0
  sleep "$POLL_S"
done
say "watching for the notice that this spot instance is to go"

until notice=$(metadata spot/instance-action); do sleep "$POLL_S"; done
say "notice: $notice"
# A dead node needs no draining, and until then it is tried again: Ray may be about to start.
until ray drain-node --node-id "$(node_id)" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "EC2 takes this spot instance back" \
  --deadline-remaining-seconds "$(seconds_left "$notice")"; do
  sleep 1
done
say "Ray drains this node"
