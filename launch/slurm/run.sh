#!/usr/bin/env bash
# Submits a SLURM job that trains on GPU nodes, one task a GPU: see usage below and README.md.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm/run.sh [--nodes N] [--gpus-per-node N] [--cpus-per-task N] [--time LIMIT] [--sbatch=ARGUMENT]..
                           [--restarts N] [--dry-run] -- TRAIN...

  --nodes N           (default 1)
  --gpus-per-node N   and tasks per node: JAX gives each task one GPU (default 8)
  --cpus-per-task N   (default 12)
  --time LIMIT        of one allocation, as sbatch takes it; the job queues itself again until trained (default 24:00:00)
  --sbatch ARGUMENT   one more for sbatch, e.g. --sbatch=--partition=h100; may be repeated
  --restarts N        at most (default 50)
  --dry-run           show the job, submit nothing
  TRAIN               arguments of uhd-jax train; paths as the nodes see them
TEXT
}

NODES=1 GPUS=8 CPUS=12 TIME=24:00:00 RESTARTS=50 SBATCH=()
split_arguments "$@"
set -- ${OWN[@]+"${OWN[@]}"}
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && NODES="$2" && shift 2 ;;
    --gpus-per-node) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && GPUS="$2" && shift 2 ;;
    --cpus-per-task) require "$1" "${2-}" "a number from 1" '[1-9][0-9]*' && CPUS="$2" && shift 2 ;;
    --time) require "$1" "${2-}" "a time as 24:00:00" '[0-9:-]+' && TIME="$2" && shift 2 ;;
    --sbatch) require "$1" "${2-}" "an argument as --partition=NAME" '-.+' && SBATCH+=("$2") && shift 2 ;;
    --restarts) require "$1" "${2-}" "a number" '[0-9]+' && RESTARTS="$2" && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    *) usage >&2 && die "unknown argument: $1" ;;
  esac
done

TASKS=$((NODES * GPUS))
PROGRAM="$VENV_DIR/bin/uhd-jax"
[ "$DRY_RUN" = 0 ] || PROGRAM="${PROGRAM#"$ROOT/"}"

job() {
  cat <<EOT
#!/usr/bin/env bash
#SBATCH --job-name=uhd-jax
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --cpus-per-task=$CPUS
#SBATCH --time=$TIME
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=uhd-jax-%j.log
EOT
  for argument in ${SBATCH[@]+"${SBATCH[@]}"}; do printf '#SBATCH %s\n' "$argument"; done
  cat <<EOT
# SIGTERM goes to the tasks, at the end of the time and on preemption: all save the same step and leave with status 0.
set -u
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export JAX_COMPILATION_CACHE_DIR=$(quoted "$WORKDIR/programs")
saved() { ls $(quoted "$WORKDIR/checkpoints") 2>/dev/null; }
before="\$(saved)" status=0
srun --kill-on-bad-exit=1 --label \\
  $(quoted "$PROGRAM" train "$RESTART_HUNG" "${TRAIN[@]}" "--processes=$TASKS" "--devices=$TASKS") || status=\$?
if [ -e $(quoted "$WORKDIR/trained.json") ]; then
  exit 0
fi
if [ "\$status" != 0 ] && [ "\$before" = "\$(saved)" ]; then
  echo "failed with status \$status before it had saved anything: not tried again"
  exit 1
fi
if [ "\${SLURM_RESTART_COUNT:-0}" -lt $RESTARTS ]; then
  echo "not trained yet (status \$status): in the queue again"
  scontrol requeue "\$SLURM_JOB_ID"
  exit 0
fi
echo "not trained after $RESTARTS restarts (status \$status)"
exit 1
EOT
}

if [ "$DRY_RUN" = 1 ]; then
  job
  exit
fi
command -v sbatch >/dev/null || die "sbatch is not there: start this on a login node of the cluster"
ensure_installed "[gpu]"
job | sbatch
