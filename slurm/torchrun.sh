#!/bin/bash
# One node of a job step under torchrun: torchrun with the node's number, and USR1 past it to its ranks. torchrun itself
# would die of USR1, or with --signals-to-handle give the ranks 30 s and then kill them.
#
#   torchrun.sh TORCHRUN ... -- PROGRAM ...
set -euo pipefail
source "$MEGAMIX_SLURM/common.sh"

torchrun=()
while [ "$1" != -- ]; do
  torchrun+=("$1")
  shift
done
shift

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$MEGAMIX_CPUS}
child=''
trap '[ -z "$child" ] || pkill -USR1 --parent "$child" || :' USR1
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM

# A shell cannot set a trap for a signal that it was started to ignore: env resets it for the ranks.
(
  trap '' USR1
  exec "${torchrun[@]}" --node-rank="$SLURM_NODEID" --no-python \
    env --default-signal=USR1 bash "$MEGAMIX_SLURM/rank.sh" "$@"
) &
child=$!
code=0
await "$child" || code=$?
exit "$code"
