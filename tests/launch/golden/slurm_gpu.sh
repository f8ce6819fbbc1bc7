#!/bin/bash
# sbatch THIS, from the checkout.
#SBATCH --job-name=rsd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Preemption starts the job again; SIGTERM comes in time to write a checkpoint before the limit too.
#SBATCH --requeue
#SBATCH --signal=TERM@120

set -u -o pipefail
# SIGTERM is for the programs; this shell waits for how they end.
trap ':' TERM
{ module load cuda; } || exit

status=0
# JAX finds the coordinator and the other processes by itself.
srun python -m experiments.generate '--prompt="yes": #no it'"'"'s $HOME $(HOME) é' --checkpoint=DIR || status=$?

# 75 and 143: what was done is saved, nothing is wrong with the job.
case "$status" in
  75 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
      # If Slurm has put it back already, that is refused, and all is well.
      scontrol requeue "$SLURM_JOB_ID" || true
    fi
    ;;
esac
exit "$status"
