#!/usr/bin/env bash
# Trains on a TPU VM, or on all workers of a pod slice, and creates it again when it was preempted: see usage below.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm/run.sh --name NAME --zone ZONE --type TYPE --version IMAGE [--project P] [--spot] [--setup COMMAND]
                            [--chips N] [--attempts N] [--delete] [--dry-run] -- TRAIN...

  --name, --zone     of the TPU VM; made if absent
  --type, --version  as gcloud takes them, e.g. v5litepod-16 and v2-alpha-tpuv5-lite
  --project P        (default: gcloud's)
  --spot             cheaper, and preempted at any time
  --setup COMMAND    run on every worker of a new VM, e.g. to mount the storage that holds the workdir
  --chips N          devices that the workers must see together, others are an error; a chip of tpu7x is two
  --attempts N       starts without a new checkpoint between them before giving up (default 5)
  --delete           the VM when training is done
  --dry-run          show the commands of one round, run nothing
  TRAIN              arguments of uhd-jax train; --workdir on storage that all workers share
TEXT
}

NAME="" ZONE="" TYPE="" VERSION="" PROJECT="" SPOT=0 SETUP="" CHIPS="" ATTEMPTS=5 DELETE=0
split_arguments "$@"
set -- ${OWN[@]+"${OWN[@]}"}
while [ $# -gt 0 ]; do
  case "$1" in
    --name) require "$1" "${2-}" "a name" '[a-z][a-z0-9-]*' && NAME="$2" && shift 2 ;;
    --zone) require "$1" "${2-}" "a zone as us-west4-a" '[a-z0-9-]+' && ZONE="$2" && shift 2 ;;
    --type) require "$1" "${2-}" "a type as v6e-16" '[a-z0-9-]+' && TYPE="$2" && shift 2 ;;
    --version) require "$1" "${2-}" "an image as v2-alpha-tpuv6e" '[a-z0-9.-]+' && VERSION="$2" && shift 2 ;;
    --project) require "$1" "${2-}" "a project" '[a-z0-9:.-]+' && PROJECT="$2" && shift 2 ;;
    --setup) require "$1" "${2-}" "a command" '.+' && SETUP="$2" && shift 2 ;;
    --chips) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && CHIPS="$2" && shift 2 ;;
    --attempts) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && ATTEMPTS="$2" && shift 2 ;;
    --spot) SPOT=1 && shift ;;
    --delete) DELETE=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    *) usage >&2 && die "unknown argument: $1" ;;
  esac
done
for value in "--name $NAME" "--zone $ZONE" "--type $TYPE" "--version $VERSION"; do
  [ -n "${value#* }" ] || die "${value% } is needed"
done
[ "$DRY_RUN" = 1 ] || command -v gcloud >/dev/null || die "gcloud is not there: install the Google Cloud CLI"

TPU=(gcloud compute tpus tpu-vm)
WHERE=("$NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
state() { "${TPU[@]}" describe "${WHERE[@]}" --format='value(state)' 2>/dev/null || echo ABSENT; }
on_all() { act "${TPU[@]}" ssh "${WHERE[@]}" --worker=all --command="$1"; }
on_first() { "${TPU[@]}" ssh "${WHERE[@]}" --worker=0 --command="$1" 2>/dev/null; }

prepare() {
  local spot=()
  [ "$SPOT" = 0 ] || spot=(--spot)
  act "${TPU[@]}" create "${WHERE[@]}" "--accelerator-type=$TYPE" "--version=$VERSION" ${spot[@]+"${spot[@]}"} &&
    install_there
}

# One commit for the whole of this run, also where a VM is made again after days.
COMMIT=COMMIT
[ "$DRY_RUN" = 1 ] || COMMIT="$(git -C "$ROOT" rev-parse HEAD)" || die "$ROOT is not a git repository"
# shellcheck disable=SC2016  # expanded there
# What an earlier connection left running holds the chips; it saves and ends first.
END_OLD='if [ -e train.pid ] && kill -TERM "$(cat train.pid)"; then tail --pid="$(cat train.pid)" -f /dev/null; fi 2>/dev/null'

# Each worker notes the commit once all of it is there; it is set up once, by lines that may end in ; or a comment.
install_there() {
  local archive
  archive="${TMPDIR:-/tmp}/uhd_jax-$NAME.tar.gz"
  act git -C "$ROOT" archive --format=tar.gz --output="$archive" "$COMMIT" &&
    act "${TPU[@]}" scp "$archive" "$NAME:uhd_jax.tar.gz" "${WHERE[@]:1}" --worker=all &&
    { [ -z "$SETUP" ] || on_all "[ -e set_up ] || ( $SETUP
) && touch set_up"; } &&
    on_all "mkdir -p uhd_jax && cd uhd_jax && $END_OLD && rm -rf commit uhd_jax && tar -xzf ../uhd_jax.tar.gz \
&& PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && export PATH=~/.local/bin:\$PATH \
&& { [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv; } \
&& uv pip install --quiet --python .venv/bin/python --editable '.[tpu]' && echo $COMMIT >commit"
}

# Whether all workers have this commit.
installed() {
  "${TPU[@]}" ssh "${WHERE[@]}" --worker=all --command="test \"\$(cat uhd_jax/commit)\" = $COMMIT" 2>/dev/null
}

TRAINING="$(quoted env "JAX_COMPILATION_CACHE_DIR=$WORKDIR/programs" .venv/bin/uhd-jax train "$RESTART_HUNG" "${TRAIN[@]}" ${CHIPS:+"--devices=$CHIPS"})"
START="cd uhd_jax; $END_OLD; echo \$\$ >train.pid; exec $TRAINING"
# shellcheck disable=SC2016
STOP='kill -TERM "$(cat uhd_jax/train.pid)"'
SAVED="cd uhd_jax && ls $(quoted "$WORKDIR/checkpoints")"
DONE="cd uhd_jax && test -e $(quoted "$WORKDIR/trained.json")"

if [ "$DRY_RUN" = 1 ]; then
  printf '# when it is absent:\n'
  prepare | sed "s|$ROOT|.|g; s|${TMPDIR:-/tmp}/||g"
  printf '# until trained.json is there:\n'
  on_all "$START"
  printf '# when it was preempted, and then again from the top:\n'
  act "${TPU[@]}" delete "${WHERE[@]}" --quiet
  printf '# on Ctrl-C:\n'
  on_all "$STOP"
  exit
fi

# All workers save the same step and leave; the VM stays.
leave() {
  trap - INT TERM
  on_all "$STOP" || true
  echo "training is asked to save and leave; start the same command to go on. The VM still costs: gcloud compute tpus" \
    "tpu-vm delete ${WHERE[*]}" >&2
  exit 130
}
trap leave INT TERM

LEFT="$ATTEMPTS" BEFORE=""
while :; do
  STATE="$(state)"
  case "$STATE" in
    READY)
      if { installed || install_there; } && on_all "$START"; then :; fi
      if on_first "$DONE"; then break; fi
      ;;
    ABSENT) prepare || true ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED) act "${TPU[@]}" delete "${WHERE[@]}" --quiet || true ;;
    *) ;; # on its way to one of these
  esac
  if [ "$STATE" = READY ]; then
    NOW="$(on_first "$SAVED" || echo "$BEFORE")"
    if [ "$NOW" = "$BEFORE" ]; then LEFT=$((LEFT - 1)); else LEFT="$ATTEMPTS"; fi
    BEFORE="$NOW"
    [ "$LEFT" -gt 0 ] || die "$ATTEMPTS starts without a new checkpoint; the messages above say why. The VM still costs"
  fi
  say "state $STATE; on with it in 30 seconds"
  sleep 30
done
[ "$DELETE" = 0 ] || act "${TPU[@]}" delete "${WHERE[@]}" --quiet
say "trained: $WORKDIR"
