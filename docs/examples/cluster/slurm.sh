#!/bin/bash
# Trains on 4 nodes of 8 GPUs: sbatch slurm.sh CONFIG [key=value ...]
#
# Two minutes before the time limit SLURM signals this script, the ranks save and end, and the job
# goes back into the queue. It then goes on from its newest checkpoint.
#SBATCH --job-name=ringattn
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u

stopped=""
step=""
save_and_requeue() {
    stopped=yes
    kill -USR1 "$step" # srun hands it to every rank
}
trap save_and_requeue USR1

# Every task is a rank and finds its place in SLURM's variables. --kill-on-bad-exit ends the step as
# soon as a rank fails.
srun --kill-on-bad-exit=1 ringattn train "$@" &
step=$!
wait "$step"
code=$?
# The signal ends the wait, not the step.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done

if [[ -n "$stopped" && "$code" -eq 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
