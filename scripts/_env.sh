# Functions that the other scripts source: find a Python, create `.venv`, install into it.
# shellcheck shell=bash

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
LOG=$VENV/install.log

say() { printf '%s\n' "$*"; }

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Runs the candidate, because a pyenv shim may exist without an installed Python.
suitable() {
  "$1" -c 'import sys
sys.exit(sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

# Print the first Python 3.11 to 3.13 that can create an environment.
find_python() {
  local candidate incomplete=""
  if [[ -n ${PYTHON:-} ]]; then
    suitable "$PYTHON" || die "PYTHON is '$PYTHON', which is not a CPython 3.11, 3.12 or 3.13" \
      "that runs; set it to one, or unset it."
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    suitable "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    incomplete=${incomplete:-$candidate}
  done
  [[ -z $incomplete ]] || die "'$incomplete' lacks the modules venv and ensurepip; install them" \
    "(on Debian and Ubuntu: apt install python3-venv), then run this again."
  die "No Python 3.11, 3.12 or 3.13 was found; install one, or set PYTHON to its path."
}

# Whether `.venv` is a Python with pip and was created in this folder: its scripts contain its path, so a
# moved one does not work. One that the user created, to choose a build of torch, is fine.
venv_works() {
  suitable "$VENV/bin/python" || return 1
  "$VENV/bin/python" -c 'import pip' 2>/dev/null ||
    "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 || return 1
  [[ ! -f $VENV/.installed-in || $(<"$VENV/.installed-in") == "$ROOT" ]]
}

make_venv() {
  venv_works && return
  local python out what=created
  python=$(find_python) # exits with a message if there is none
  [[ ! -e $VENV ]] || what="created again, because the old one does not work here"
  say "environment: .venv is $what, with $("$python" -V) (some seconds)"
  rm -rf -- "$VENV" # if it is a link, removes only the link
  out=$("$python" -m venv "$VENV" 2>&1) || {
    printf '%s\n' "$out" >&2
    die "Could not create '$VENV' with '$python'; the lines above say why" \
      "(on Debian and Ubuntu, apt install python3-venv may be missing)."
  }
}

# pip_install NAME ARGUMENTS...: run pip in the checkout, with its output in the log.
pip_install() {
  local what=$1
  shift
  (cd -- "$ROOT" && "$VENV/bin/python" -m pip install "$@") >>"$LOG" 2>&1 || {
    tail -n 15 -- "$LOG" >&2
    die "Could not install $what: pip needs a package index that it can reach (PyPI, or the one in" \
      "its own settings) and free disk; the whole log is '$LOG'. Run this again to continue from here."
  }
}

# install EXTRAS: install the package, editable, with extras such as "" or "dev,judge"; does nothing if the
# same versions are installed already.
install() {
  local extras=$1 stamp=$VENV/.installed-${1:-run} wanted torch
  wanted="$(cat -- "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $ROOT"
  if [[ $(cat -- "$stamp" 2>/dev/null) == "$wanted" ]]; then
    say "install: .venv is up to date"
    return
  fi
  printf '%s\n' "$ROOT" >"$VENV/.installed-in"
  : >"$LOG"
  # In a separate first step, so that an installed build of this version, such as a CUDA build, is kept.
  torch=$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")
  say "install: torch $torch (10 seconds to 10 minutes, by build and connection; log: $LOG)"
  pip_install torch "torch==$torch"
  say "install: ray-detox${extras:+ with $extras} and the rest (1 to 5 minutes)"
  pip_install ray-detox -c constraints.txt -e ".${extras:+[$extras]}"
  # An installation with extras includes the one without.
  printf '%s\n' "$wanted" | tee -- "$stamp" >"$VENV/.installed-run"
}
