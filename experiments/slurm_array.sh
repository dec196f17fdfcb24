#!/bin/bash
# One config over many machines by a Slurm job array: task I of N measures points I, I + N, ... into files of its own.
#
#   sbatch --array=1-16 experiments/slurm_array.sh configs/NAME.toml 16 [--size full] [more flags]
#
# from the root of the repository, on a file system that all machines see. N is an argument, not the size of the array,
# so that some tasks alone can run again: --array=3,7 goes on with parts 3 and 7 of the same 16. Any other scheduler
# will do: only the number of the task comes from Slurm.
#SBATCH --job-name=lora_limits
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --requeue

set -eu

if [ "$#" -lt 2 ]; then
    echo "usage: sbatch --array=1-N $0 configs/NAME.toml N [flags of python -m experiments]" >&2
    exit 2
fi
config=$1 count=$2
shift 2

# A task that was stopped and requeued goes on where it was.
exec "${PYTHON:-.venv/bin/python}" -m experiments "$config" --shard "${SLURM_ARRAY_TASK_ID:?run by sbatch --array}/$count" "$@"
