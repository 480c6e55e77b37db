#!/usr/bin/env bash
# One process trains on the GPUs of this machine: see usage below and README.md.
set -euo pipefail
CALLED_FROM="$PWD"
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
  cat <<'TEXT'
usage: launch/gpu_host/run.sh [--gpus 0,1,..] [--memory 0.92] [--dry-run] -- TRAIN...

  --gpus LIST     which GPUs (default: all that nvidia-smi lists)
  --memory SHARE  of each GPU's memory that JAX takes at the start (default 0.92)
  --dry-run       show the commands, run nothing
  TRAIN           arguments of uhd-jax train: --config=FILE.py --workdir=DIR ...
TEXT
}

GPUS="" MEMORY=0.92
split_arguments "$@"
set -- ${OWN[@]+"${OWN[@]}"}
while [ $# -gt 0 ]; do
  case "$1" in
    --gpus) require "$1" "${2-}" "a list as 0,1,2" '[0-9]+(,[0-9]+)*' && GPUS="$2" && shift 2 ;;
    --memory) require "$1" "${2-}" "a share below 1" '0?\.[0-9]+' && MEMORY="$2" && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    *) usage >&2 && die "unknown argument: $1" ;;
  esac
done

if [ -z "$GPUS" ]; then
  command -v nvidia-smi >/dev/null || die "nvidia-smi is not there, so which GPUs is not known: name them, --gpus 0,1"
  GPUS="$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)"
  [ -n "$GPUS" ] || die "nvidia-smi lists no GPU"
fi
IFS=, read -ra LIST <<<"$GPUS"
if [ "$DRY_RUN" = 0 ]; then ensure_installed "[gpu]"; fi

PROGRAM="$VENV_DIR/bin/uhd-jax"
[ "$DRY_RUN" = 0 ] || PROGRAM="${PROGRAM#"$ROOT/"}"
cd "$CALLED_FROM"
# JAX_PLATFORMS: an error instead of a CPU run where the driver is missing. --devices: where it shows fewer GPUs.
COMMAND=(env JAX_PLATFORMS=cuda "CUDA_VISIBLE_DEVICES=$GPUS" "XLA_PYTHON_CLIENT_MEM_FRACTION=$MEMORY"
  "JAX_COMPILATION_CACHE_DIR=$WORKDIR/programs"
  "$PROGRAM" train "${TRAIN[@]}" --processes=1 "--devices=${#LIST[@]}")
printf '+ %s\n' "$(quoted "${COMMAND[@]}")"
[ "$DRY_RUN" = 1 ] || exec "${COMMAND[@]}"
