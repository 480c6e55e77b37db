#!/usr/bin/env bash
# Several processes on this machine train as one, each on devices of its own: see usage below and README.md.
set -euo pipefail
CALLED_FROM="$PWD"
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
  cat <<'TEXT'
usage: launch/local/run.sh [--processes N] [--devices-each N] [--port N] [--grace N] [--dry-run] -- TRAIN...

  --processes N      how many (default 2)
  --devices-each N   CPU devices of each (default 1)
  --port N           on which they find each other (default: a free one)
  --grace N          seconds that the others get to save and leave when one ends badly (default 30)
  --dry-run          show the commands, run nothing
  TRAIN              arguments of uhd-jax train: --config=FILE.py --workdir=DIR ...
TEXT
}

PROCESSES=2 DEVICES=1 PORT="" GRACE=30
split_arguments "$@"
set -- ${OWN[@]+"${OWN[@]}"}
while [ $# -gt 0 ]; do
  case "$1" in
    --processes) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && PROCESSES="$2" && shift 2 ;;
    --devices-each) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && DEVICES="$2" && shift 2 ;;
    --port) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && PORT="$2" && shift 2 ;;
    --grace) require "$1" "${2-}" "a number of seconds" '[0-9]+' && GRACE="$2" && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    *) usage >&2 && die "unknown argument: $1" ;;
  esac
done

if [ "$DRY_RUN" = 1 ]; then
  PORT="${PORT:-PORT}"
else
  ensure_installed
  PORT="${PORT:-$("$VENV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
fi
ENVIRONMENT=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$DEVICES")
COMMAND=("${VENV_DIR#"$ROOT/"}/bin/uhd-jax" train "${TRAIN[@]}" "--coordinator=localhost:$PORT"
  "--processes=$PROCESSES" "--devices=$((PROCESSES * DEVICES))")
[ "$DRY_RUN" = 1 ] || COMMAND[0]="$VENV_DIR/bin/uhd-jax"

PIDS=() BAD=0
to_all() { for pid in ${PIDS[@]+"${PIDS[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done; }
# Training saves and leaves on SIGTERM, so that is what all get, whatever stopped this script.
trap 'to_all TERM' INT TERM HUP

cd "$CALLED_FROM"
for ((i = 0; i < PROCESSES; i++)); do
  printf '+ %s\n' "$(quoted env "${ENVIRONMENT[@]}" "${COMMAND[@]}" "--process=$i")"
  [ "$DRY_RUN" = 0 ] || continue
  # In process groups of their own: Ctrl-C reaches this script alone, which passes on one signal, not two.
  set -m
  env "${ENVIRONMENT[@]}" "${COMMAND[@]}" "--process=$i" </dev/null > >(sed -u "s/^/[$i] /") 2>&1 &
  PIDS+=($!)
  set +m
done

LEFT=("${PIDS[@]}")
while [ ${#LEFT[@]} -gt 0 ]; do
  still=()
  for pid in "${LEFT[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      still+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if [ "$status" != 0 ] && [ "$BAD" = 0 ]; then
      BAD="$status"
      for ((i = 0; i < PROCESSES; i++)); do [ "${PIDS[i]}" != "$pid" ] || break; done
      echo "process $i ended with status $status; the others have $GRACE seconds" >&2
      to_all TERM
      END=$((SECONDS + GRACE))
    fi
  done
  LEFT=(${still[@]+"${still[@]}"})
  if [ "$BAD" != 0 ] && [ "$SECONDS" -ge "$END" ]; then to_all KILL; fi
  [ ${#LEFT[@]} -eq 0 ] || sleep 0.5 || true
done
[ "$BAD" = 0 ] || echo "start the same command again to go on from the last checkpoint" >&2
exit "$BAD"
