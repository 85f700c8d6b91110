#!/usr/bin/env bash
# Fetch what only some tests use, and print the variables that tell the tests where it is.
set -euo pipefail

if [[ $# -ne 1 || $1 == -h || $1 == --help ]]; then
  cat <<'USAGE'
Usage: eval "$(bash scripts/test_tools.sh FOLDER)" && bash scripts/test.sh

Without these tools the tests that use them are skipped, and say so. Into FOLDER go

  dynalite    a second, stricter DynamoDB emulator (npm; needs node)
  ministack   a third one, which also deploys cluster/results.yaml (PyPI, an environment of its own)

and with apt, where they are not there, node and Chromium for the page's tests.
USAGE
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit
  exit 2
fi

DYNALITE=4.0.0 MINISTACK=1.5.33
folder=$1
mkdir -p -- "$folder"
folder=$(cd -- "$folder" && pwd -P)

apt_install() {
  local sudo=()
  [[ $(id -u) == 0 ]] || sudo=(sudo -n)
  "${sudo[@]}" apt-get update -qq >&2 &&
    "${sudo[@]}" apt-get install -qq -y "$@" >&2
}

# fetched NAME VARIABLE FILE COMMAND...: fetches FILE if need be and prints VARIABLE; without the
# tool its tests are skipped, for a registry that is away should not stop all the others.
fetched() {
  local name=$1 variable=$2 file=$3
  shift 3
  if [[ -e $file ]] || { "$@" && [[ -e $file ]]; }; then
    printf 'export %s=%q\n' "$variable" "$file"
  else
    printf 'test_tools.sh: %s could not be fetched; its tests are skipped.\n' "$name" >&2
  fi
}

dynalite() {
  command -v npm >/dev/null || apt_install nodejs npm
  timeout 180 npm install --silent --no-fund --no-audit --prefix "$folder" "dynalite@$DYNALITE" >&2
}

ministack() {
  # It pins a botocore of its own; boto3 is what a Lambda finds on AWS, cryptography signs tokens.
  python3 -m venv "$folder/ministack" >&2 &&
    timeout 300 "$folder/ministack/bin/pip" install --quiet --disable-pip-version-check \
      "ministack==$MINISTACK" boto3 cryptography >&2
}

fetched dynalite RAY_DETOX_DYNALITE "$folder/node_modules/dynalite/cli.js" dynalite
fetched ministack RAY_DETOX_MINISTACK "$folder/ministack/bin/ministack" ministack
fetched Chromium RAY_DETOX_CHROMIUM "${RAY_DETOX_CHROMIUM:-/usr/bin/chromium}" \
  apt_install chromium fonts-liberation fonts-noto-cjk
