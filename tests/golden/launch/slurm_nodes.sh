#!/usr/bin/env bash
#SBATCH --job-name=uhd-jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --time=2:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=uhd-jax-%j.log
#SBATCH --partition=h100
# SIGTERM goes to the tasks, at the end of the time and on preemption: all save the same step and leave with status 0.
set -u
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export JAX_COMPILATION_CACHE_DIR=runs/demo/programs
saved() { ls runs/demo/checkpoints 2>/dev/null; }
before="$(saved)" status=0
srun --kill-on-bad-exit=1 --label \
  .venv/bin/uhd-jax train --config.train.hang_exits=True --config=configs/demo.py --workdir=runs/demo '--config.train.stages[0].steps=4' --processes=16 --devices=16 || status=$?
if [ -e runs/demo/trained.json ]; then
  exit 0
fi
if [ "$status" != 0 ] && [ "$before" = "$(saved)" ]; then
  echo "failed with status $status before it had saved anything: not tried again"
  exit 1
fi
if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  echo "not trained yet (status $status): in the queue again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
echo "not trained after 50 restarts (status $status)"
exit 1
