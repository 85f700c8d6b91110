#!/usr/bin/env bash
# Install tools that only some tests use, and print the variables through which tests find them.
set -euo pipefail

if [[ $# -ne 1 || $1 == -h || $1 == --help ]]; then
  cat <<'USAGE'
Usage: eval "$(bash scripts/test_tools.sh FOLDER)" && bash scripts/test.sh

Tests whose tool is missing are skipped, with a message. Installs into FOLDER:

  dynalite    a second, stricter DynamoDB emulator (npm; needs node)
  ministack   a third one, which also deploys cluster/results.yaml (PyPI, in its own environment)
  packages    the publishers' packages of the page's libraries (npm)

and with apt, if they are missing, node and Chromium for the tests of the results page.
USAGE
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit
  exit 2
fi

DYNALITE=4.0.0 MINISTACK=1.5.33
vendor=$(dirname -- "${BASH_SOURCE[0]}")/../ray_detox/viewer/static/vendor
folder=$1
mkdir -p -- "$folder"
folder=$(cd -- "$folder" && pwd -P)

apt_install() {
  local sudo=()
  [[ $(id -u) == 0 ]] || sudo=(sudo -n)
  "${sudo[@]}" apt-get update -qq >&2 &&
    "${sudo[@]}" apt-get install -qq -y "$@" >&2
}

# provide NAME VARIABLE FILE COMMAND...: install FILE if it is missing, and print VARIABLE. A failure is
# only reported, because an unreachable registry must not keep the other tests from running.
provide() {
  local name=$1 variable=$2 file=$3
  shift 3
  if [[ -e $file ]] || { "$@" && [[ -e $file ]]; }; then
    printf 'export %s=%q\n' "$variable" "$file"
  else
    printf 'test_tools.sh: %s could not be installed; its tests are skipped.\n' "$name" >&2
  fi
}

dynalite() {
  command -v npm >/dev/null || apt_install nodejs npm
  timeout 180 npm install --silent --no-fund --no-audit --prefix "$folder" "dynalite@$DYNALITE" >&2
}

ministack() {
  # In its own environment, because it pins botocore; Lambda functions need boto3, tokens cryptography.
  python3 -m venv "$folder/ministack" >&2 &&
    timeout 300 "$folder/ministack/bin/pip" install --quiet --disable-pip-version-check \
      "ministack==$MINISTACK" boto3 cryptography >&2
}

packages() {
  local names
  mapfile -t names < <(python3 - "$vendor/MANIFEST.json" <<'PYTHON'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    print(*(f"{each['name']}@{each['version']}" for each in json.load(file)), sep="\n")
PYTHON
  )
  mkdir -p "$folder/packages.part"
  timeout 180 npm pack --silent --ignore-scripts --pack-destination "$folder/packages.part" "${names[@]}" >&2 &&
    mv -- "$folder/packages.part" "$folder/packages"
}

provide dynalite RAY_DETOX_DYNALITE "$folder/node_modules/dynalite/cli.js" dynalite
provide "publishers' packages" RAY_DETOX_PACKAGES "$folder/packages" packages
provide ministack RAY_DETOX_MINISTACK "$folder/ministack/bin/ministack" ministack
provide Chromium RAY_DETOX_CHROMIUM "${RAY_DETOX_CHROMIUM:-/usr/bin/chromium}" \
  apt_install chromium fonts-liberation fonts-noto-cjk
