#!/usr/bin/env bash
# One point of a sweep per task, in DIR/000, DIR/001, ...; here twelve points, four at a time:
#   sbatch --array=0-11%4 configs/launch/slurm_array.sh --config=STUDY --workdir=DIR
# The table, at any time: python -m dpjax.commands.sweep --config=STUDY --workdir=DIR --table_only
#SBATCH --job-name=dpjax-sweep
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun python -m dpjax.train "$@" --sweep_index="$SLURM_ARRAY_TASK_ID"
code=$?
# Saved before the time limit: goes on in a new allocation.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
