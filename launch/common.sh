# shellcheck shell=bash
# Sourced by the scripts beside it: finds Python, makes the virtual environment, installs the project once.
# VENV_DIR chooses the environment (default: .venv in the repository), PYTHON the interpreter.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV_DIR="${VENV_DIR:-$ROOT/.venv}"
case "$VENV_DIR" in /*) ;; *) VENV_DIR="$PWD/$VENV_DIR" ;; esac
VENV_PYTHON="$VENV_DIR/bin/python"

say() { printf '\n== %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the first interpreter that is new enough.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or newer"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed; python3 here is: $(python3 --version 2>&1 || true)." \
    "Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

ensure_venv() {
  if [ -x "$VENV_PYTHON" ] && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    is_new_enough "$VENV_PYTHON" || die "$VENV_DIR holds a Python older than 3.11; delete that folder and start again"
    return
  fi
  local python
  python="$(find_python)" || exit 1
  # Debian and Ubuntu keep ensurepip in a package of its own; without it venv fails half-way.
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments: install python3-venv (Debian, Ubuntu: sudo apt install python3-venv)"
  say "Making $VENV_DIR with $("$python" --version)"
  "$python" -m venv "$VENV_DIR" || die "could not make $VENV_DIR"
}

# A digest of everything that decides what is installed. $1: the extras, as in "[test]", or nothing.
install_digest() {
  "$VENV_PYTHON" - "$ROOT" "$1" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
parts = [sys.version, str(root), sys.argv[2], *((root / name).read_text() for name in ("requirements.txt", "pyproject.toml"))]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

# Installs the project in place, unless this environment already holds it. $1: the extras, as in "[test]", or nothing.
ensure_installed() {
  local extras="${1:-}" stamp digest
  ensure_venv
  stamp="$VENV_DIR/.installed${extras//[^a-z]/-}"
  digest="$(install_digest "$extras")"
  if [ -x "$VENV_DIR/bin/uhd-jax" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ]; then
    return
  fi
  say "Installing the project and what it needs into $VENV_DIR"
  # uv is twenty times faster than pip. It leaves byte-compiling to the first import of every process unless told.
  if ! { "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check uv &&
    UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never \
      "$VENV_DIR/bin/uv" pip install --quiet --python "$VENV_PYTHON" --editable "$ROOT$extras"; }; then
    echo "uv could not install the project; trying again with pip, which is slower"
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT$extras" ||
      die "installation failed; the messages above say why"
  fi
  printf '%s\n' "$digest" >"$stamp"
}

# --- shared by the launchers in the folders beside this file --------------------------------------------------------
DRY_RUN=0
# For launchers that start a run again: nobody else ends a process that hangs. Goes before the arguments, which win.
# shellcheck disable=SC2034
RESTART_HUNG=--config.train.hang_exits=True

# Words as they could be typed.
quoted() {
  local word text="" quote="'\\''"
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then word="'${word//\'/$quote}'"; fi
    text+="$word "
  done
  printf '%s' "${text% }"
}

# Shows a command, and runs it unless this is a dry run.
act() {
  printf '+ %s\n' "$(quoted "$@")"
  [ "$DRY_RUN" = 1 ] || "$@"
}

# Splits `OWN.. -- TRAIN..` at the `--`: OWN holds the launcher's arguments (`--name=value` as two words), TRAIN those
# of `uhd-jax train`, which need at least --config and --workdir.
split_arguments() {
  OWN=() TRAIN=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
      --*=*) OWN+=("${1%%=*}" "${1#*=}") ;;
      *) OWN+=("$1") ;;
    esac
    shift
  done
  [ $# -eq 0 ] || TRAIN=("${@:2}")
  case " ${OWN[*]-} " in *" -h "* | *" --help "*) usage && exit 0 ;; esac
  [ ${#TRAIN[@]} -gt 0 ] || {
    usage >&2
    die "after -- come the arguments of uhd-jax train: -- --config=configs/demo.py --workdir=runs/demo"
  }
  WORKDIR=""
  local argument previous=""
  for argument in "${TRAIN[@]}"; do
    case "$argument" in --workdir=*) WORKDIR="${argument#*=}" ;; esac
    [ "$previous" != --workdir ] || WORKDIR="$argument"
    previous="$argument"
  done
  [ -n "$WORKDIR" ] || die "after -- a --workdir=DIR is needed"
}

# $1: the name of a flag, $2: what was given, $3: what it should be, in words, $4: a pattern of it.
require() { [[ "$2" =~ ^($4)$ ]] || die "$1 needs $3, not '$2'"; }
