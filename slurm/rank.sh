#!/bin/bash
# One process of a job step: says which rank it is, passes USR1 on to the program, and leaves the exit code in a file. The
# code 75, a checkpoint is there, ends in 0: srun and torchrun take every other for a failure, and would kill the ranks
# that are still closing their files.
#
#   rank.sh [--alone] PROGRAM ...      --alone: the program is no rank of a job
set -euo pipefail
source "$MEGAMIX_SLURM/common.sh"

if [ "$1" = --alone ]; then
  shift
elif [ -z "${RANK:-}" ]; then # torchrun has said it already
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
  export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

child='' asked=''
trap 'asked=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || :' USR1
# Where Slurm signals only the process it has started, the program would not hear of scancel.
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM

code=138
if [ -z "$asked" ]; then
  "$@" &
  child=$!
  code=0
  await "$child" || code=$?
fi
# 128 + USR1: it had begun nothing yet that could be lost, and goes on from its last safe point; its peers, which wait for
# it, have to be ended, so that this is a failure to srun.
if [ "$code" != 0 ]; then
  outcome=$code
  [ "$code" != 138 ] || outcome=75
  (set -o noclobber && echo "$outcome" >"$MEGAMIX_OUTCOME") 2>/dev/null || : # the first has said it
fi
[ "$code" != 75 ] || code=0
exit "$code"
