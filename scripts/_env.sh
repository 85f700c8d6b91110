# Shared by quickstart.sh and test.sh, which source it: a Python, `.venv`, and what is installed in it.
# shellcheck shell=bash

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
LOG=$VENV/install.log

say() { printf '%s\n' "$*"; }

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Pyenv's shims exist without a Python behind them, so a Python is what answers as one.
suitable() {
  "$1" -c 'import sys
sys.exit(sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

# Prints the first Python 3.11 to 3.13 that can make an environment.
find_python() {
  local candidate lame=""
  if [[ -n ${PYTHON:-} ]]; then
    suitable "$PYTHON" || die "PYTHON is '$PYTHON', which is not a CPython 3.11, 3.12 or 3.13" \
      "that runs; point it at one, or unset it."
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    suitable "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    lame=${lame:-$candidate}
  done
  [[ -z $lame ]] || die "'$lame' lacks the modules venv and ensurepip; install them" \
    "(on Debian and Ubuntu: apt install python3-venv), then run this again."
  die "No Python 3.11, 3.12 or 3.13 was found; install one, or set PYTHON to its path."
}

# `.venv` answers as a Python with pip, and was not moved here from elsewhere: it has its path inside.
# One made by hand, to choose a build of torch, will do as well.
venv_works() {
  suitable "$VENV/bin/python" || return 1
  "$VENV/bin/python" -c 'import pip' 2>/dev/null ||
    "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 || return 1
  [[ ! -f $VENV/.installed-in || $(<"$VENV/.installed-in") == "$ROOT" ]]
}

make_venv() {
  venv_works && return
  local python out what=made
  python=$(find_python) # exits with its sentence
  [[ ! -e $VENV ]] || what="made anew, for the old one does not run here"
  say "environment: .venv is $what, with $("$python" -V) (some seconds)"
  rm -rf -- "$VENV" # of a link, the link alone
  out=$("$python" -m venv "$VENV" 2>&1) || {
    printf '%s\n' "$out" >&2
    die "Could not make '$VENV' with '$python'; the lines above say why" \
      "(on Debian and Ubuntu, apt install python3-venv may be missing)."
  }
}

# pip_install WHAT ARGUMENTS...: in the checkout, to the log.
pip_install() {
  local what=$1
  shift
  (cd -- "$ROOT" && "$VENV/bin/python" -m pip install "$@") >>"$LOG" 2>&1 || {
    tail -n 15 -- "$LOG" >&2
    die "Could not install $what: pip needs a package index that it can reach (PyPI, or the one in" \
      "its own settings) and room on the disk; the whole log is '$LOG', and a further try goes on from here."
  }
}

# install EXTRAS: the package, editable, with "" or "dev,judge"; at once where that is done already.
install() {
  local extras=$1 stamp=$VENV/.installed-${1:-run} wanted torch
  wanted="$(cat -- "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $ROOT"
  if [[ $(cat -- "$stamp" 2>/dev/null) == "$wanted" ]]; then
    say "install: .venv is up to date"
    return
  fi
  printf '%s\n' "$ROOT" >"$VENV/.installed-in"
  : >"$LOG"
  # First and alone: where a build of this torch is there, a CUDA one say, it stays.
  torch=$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")
  say "install: torch $torch (10 seconds to 10 minutes, by build and connection; log: $LOG)"
  pip_install torch "torch==$torch"
  say "install: ray-detox${extras:+ with $extras} and the rest (1 to 5 minutes)"
  pip_install ray-detox -c constraints.txt -e ".${extras:+[$extras]}"
  # The larger set serves the smaller one, too.
  printf '%s\n' "$wanted" | tee -- "$stamp" >"$VENV/.installed-run"
}
