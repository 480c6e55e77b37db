#!/usr/bin/env bash
# From a clean checkout to a trained, evaluated and questioned model: see usage below. Stop it whenever you like
# (Ctrl-C, kill) and start it again: finished steps are kept, training goes on from its last checkpoint.
set -euo pipefail
CALLED_FROM="$PWD"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [--seed N] [--out DIR] [--control] [--short]

  --seed N    seed of training and data (default 0)
  --out DIR   where everything is written (default runs/quickstart, or runs/quickstart-short with --short)
  --control   also train the same model equally long on thumbnails alone, and report what it reads
  --short     a few steps of every stage: shows that everything runs, learns nothing

VENV_DIR chooses the virtual environment (default .venv), PYTHON the interpreter it is made with.
TEXT
}

SEED=0 OUT="" CONTROL=0 SHORT=0
while [ $# -gt 0 ]; do
  case "$1" in
    --seed=* | --out=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --seed)
      SEED="${2-}"
      [[ "$SEED" =~ ^[0-9]+$ ]] || die "--seed needs a number"
      shift 2
      ;;
    --out)
      OUT="${2-}"
      [ -n "$OUT" ] || die "--out needs a folder"
      shift 2
      ;;
    --control) CONTROL=1 && shift ;;
    --short) SHORT=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    *)
      usage >&2
      die "unknown argument: $1"
      ;;
  esac
done
if [ -z "$OUT" ]; then
  OUT="$ROOT/runs/quickstart"
  [ "$SHORT" = 0 ] || OUT="$OUT-short"
fi
case "$OUT" in /*) ;; *) OUT="$CALLED_FROM/$OUT" ;; esac
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd -P)"
cd "$ROOT"

# The lock is inherited by what this script starts, so it also holds off a second start while a step that outlived a
# killed script is still saving.
exec 9>"$OUT/.lock"
if ! flock --nonblock 9; then
  echo "another process is at work in $OUT; waiting for it"
  flock 9
fi

# One folder, one run: results of different settings never mix.
SETTINGS="seed=$SEED short=$SHORT"
if [ -e "$OUT/settings.txt" ] && [ "$(cat "$OUT/settings.txt")" != "$SETTINGS" ]; then
  die "$OUT holds a run with $(cat "$OUT/settings.txt"), not $SETTINGS; choose another folder with --out, or delete it"
fi
printf '%s\n' "$SETTINGS" >"$OUT/settings.txt"

# --- time spent: one line "step seconds" per attempt in elapsed.txt; the step in progress is in running.txt ---------
begin() { printf '%s %s\n' "$1" "$(date +%s)" >"$OUT/running.txt"; }

# $1: when the step ended, in seconds of the epoch.
finish() {
  local step started
  read -r step started <"$OUT/running.txt"
  printf '%s %s\n' "$step" "$(($1 - started))" >>"$OUT/elapsed.txt"
  rm "$OUT/running.txt"
}

# After a kill that could not be caught, the newest file tells how long the last attempt lived.
if [ -e "$OUT/running.txt" ]; then
  newest="$(find "$OUT" -type f -printf '%T@\n' | sort -n | tail -n 1)"
  finish "${newest%.*}"
fi

# --- steps ---------------------------------------------------------------------------------------------------------
CHILD=""
INTERRUPTED=""
WORKED=0

# Training saves and leaves on SIGTERM, so that is what it gets, whatever stopped this script.
interrupt() {
  INTERRUPTED=1
  if [ -n "$CHILD" ]; then
    kill -TERM "$CHILD" 2>/dev/null || true
  else
    stop
  fi
}

stop() {
  [ ! -e "$OUT/running.txt" ] || finish "$(date +%s)"
  printf '\nInterrupted. Start the same command again to go on.\n' >&2
  exit 130
}
trap interrupt INT TERM HUP

# step NAME RESULT COMMAND..: runs the command, which makes the file RESULT, unless that file is there already.
step() {
  local name="$1" result="$2" status
  shift 2
  if [ -e "$result" ]; then
    echo "$name: done before"
    return
  fi
  say "$name"
  WORKED=1
  begin "${name%%:*}"
  # In a process group of its own: Ctrl-C reaches this script alone, which passes on one signal, not two.
  set -m
  "$@" </dev/null &
  CHILD=$!
  set +m
  while :; do
    status=0
    wait "$CHILD" || status=$?
    kill -0 "$CHILD" 2>/dev/null || break
  done
  CHILD=""
  [ -z "$INTERRUPTED" ] || stop
  finish "$(date +%s)"
  [ "$status" = 0 ] || die "step '$name' failed with exit status $status"
  [ -e "$result" ] || die "step '$name' ended early; start the same command again to go on"
}

# A step ends when this script is killed outright.
TIED=()
! command -v setpriv >/dev/null || TIED=(setpriv --pdeathsig TERM)
uhd() { exec "${TIED[@]}" "$VENV_DIR/bin/uhd-jax" "$@"; }

begin install
ensure_installed
finish "$(date +%s)"

CONFIG=configs/demo.py
TRAIN=(--config.train.seed="$SEED")
if [ "$SHORT" = 1 ]; then
  for stage in 0 1 2 3; do TRAIN+=("--config.train.stages[$stage].steps=6"); done
fi

step "train: four stages, from random weights" "$OUT/trained.json" \
  uhd train --config="$CONFIG" "${TRAIN[@]}" --workdir="$OUT"
step "evaluate: held-out pages, sliced and as thumbnails" "$OUT/evaluation.json" \
  uhd evaluate --checkpoint="$OUT" --task=digit_pages --out="$OUT/evaluation.json"
step "slices: how one of those pages is cut" "$OUT/slices.png" \
  uhd slices "$OUT/page.png" --config="$CONFIG" --out="$OUT/slices.png"
step "generate: one question about that page" "$OUT/answer.json" \
  uhd generate --checkpoint="$OUT" --image="$OUT/page.png" --prompt="Transcribe." --out="$OUT/answer.json"
if [ "$CONTROL" = 1 ]; then
  mkdir -p "$OUT/control"
  step "control_train: the same on thumbnails alone" "$OUT/control/trained.json" \
    uhd train --config="$CONFIG:thumbnail" "${TRAIN[@]}" --workdir="$OUT/control"
  step "control_evaluate: held-out pages as thumbnails" "$OUT/control/evaluation.json" \
    uhd evaluate --checkpoint="$OUT/control" --task=digit_pages --out="$OUT/control/evaluation.json"
fi
# The report covers all the others, so it is made again whenever one of them ran.
[ "$WORKED" = 0 ] || rm -f "$OUT/report.json"
step "report" "$OUT/report.json" uhd report "$OUT"

say "Everything is in $OUT"
[ "$WORKED" = 1 ] || cat "$OUT/report.json"
