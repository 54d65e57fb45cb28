#!/usr/bin/env bash
# One run over several nodes:
#   sbatch --nodes=8 configs/launch/slurm_nodes.sh --config=FILE --workdir=DIR
# DIR is on a disk that all nodes share. Slurm tells JAX who takes part; a task drives one GPU.
#SBATCH --job-name=dpjax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun python -m dpjax train "$@"
code=$?
# Saved before the time limit: goes on in a new allocation.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
