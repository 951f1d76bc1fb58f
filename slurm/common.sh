# Functions shared by the job scripts of this folder.
#
#   begin_job               environment, names, signals
#   preflight CONFIG ...    `megamix doctor` on every node
#   ranks COMMAND ...       `megamix COMMAND ...` as one process per GPU
#   once COMMAND ...        `megamix COMMAND ...` as one process
#   end_job CODE            requeues or ends the job
#
# Preemption: Slurm sends USR1 to the batch script (--signal=B:USR1@...), srun passes it to the ranks, they write a checkpoint
# and exit 75, and the job is requeued. When a node is lost, Slurm requeues the job itself.

say() { echo "megamix: $*"; }

begin_job() {
  set +u # modules and venvs read variables that are not set
  # shellcheck source=slurm/env.sh
  source "${MEGAMIX_ENV:-$MEGAMIX_SLURM/env.sh}"
  set -u
  # The last member of an array has the number of the array itself.
  job=$SLURM_JOB_ID
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  restart=${SLURM_RESTART_COUNT:-0}
  logs=${MEGAMIX_LOGS:-$PWD/logs}
  # The first rank that fails writes its exit code here; one file per start of the job.
  export MEGAMIX_OUTCOME=$logs/.outcome-$SLURM_JOB_ID-$restart
  mkdir -p "$logs"
  # Of this job's starts that were killed.
  rm -f "$logs/.outcome-$SLURM_JOB_ID-"[0-9]*
  if [[ $logs == *\\* ]]; then
    say "srun cannot write to $logs: a backslash is in the path. Set MEGAMIX_LOGS to another folder."
    exit 2
  fi
  python=${MEGAMIX_PYTHON:-python} nodes=$SLURM_JOB_NUM_NODES
  tasks=${MEGAMIX_TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
  cpus=$((${SLURM_CPUS_ON_NODE:-1} / tasks))
  ((cpus > 0)) || cpus=1
  # Else srun gives each step the job's number of tasks, and refuses other CPUs per task than the job's.
  unset SLURM_NTASKS_PER_NODE SLURM_NTASKS SLURM_NPROCS SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
  find_container
  export MEGAMIX_SLURM MASTER_ADDR MASTER_PORT
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node do not meet
  child='' asked=''
  trap 'asked=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || :' USR1
  # scancel reaches the ranks through Slurm; this shell must outlive them.
  trap : TERM
  say "job $job, start $((restart + 1)), $(date +%FT%T): $nodes nodes ($SLURM_JOB_NODELIST) of $tasks ranks;" \
    "logs in $logs/$SLURM_JOB_ID-*.log"
}

# MEGAMIX_CONTAINER: an image for pyxis where srun has it, else for apptainer. MEGAMIX_MOUNTS: SOURCE:TARGET,...
find_container() {
  pyxis=() inside=()
  [ -n "${MEGAMIX_CONTAINER:-}" ] || return 0
  python=${MEGAMIX_PYTHON:-python3}
  local path
  for path in "$PWD" "$MEGAMIX_SLURM" "$logs"; do
    if [[ $path == *[,:]* ]]; then
      say "a container cannot have $path: a comma or a colon is in the path. Choose another folder."
      exit 2
    fi
  done
  local mounts=$PWD:$PWD,$MEGAMIX_SLURM:$MEGAMIX_SLURM,$logs:$logs${MEGAMIX_MOUNTS:+,$MEGAMIX_MOUNTS} help
  help=$(srun --help 2>&1)
  if [[ $help == *--container-image* ]]; then
    pyxis=(--container-image="$MEGAMIX_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
  else
    inside=(apptainer exec --bind "$mounts" --pwd "$PWD")
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || inside+=(--nv)
    inside+=("$MEGAMIX_CONTAINER")
  fi
}

# await PID: its exit code, despite signals. `wait` only once it has ended: interrupted by a trap, bash 5.2 may lose the code.
await() {
  [ -n "${idle:-}" ] || exec {idle}<> <(:) # never written to
  while kill -0 "$1" 2>/dev/null; do read -r -t 0.2 -u "$idle" || :; done
  wait "$1"
}

# step [OPTION ...] PROGRAM ...: a job step that receives USR1. Each step divides the job's CPUs among its tasks.
step() {
  local code=0
  srun --nodes="$nodes" --kill-on-bad-exit=1 --overcommit ${pyxis[@]+"${pyxis[@]}"} "$@" </dev/null &
  child=$!
  await "$child" || code=$?
  child=''
  return "$code"
}

preflight() {
  [ "${MEGAMIX_PREFLIGHT:-1}" != 0 ] || return 0
  # A node that fails does not end the others, so that each reports. Only failures are printed for all nodes.
  # shellcheck disable=SC2016
  step --kill-on-bad-exit=0 --ntasks="$nodes" bash -c '
    code=0 said=$("$@" 2>&1) || code=$?
    [ $code = 0 ] && [ $SLURM_PROCID != 0 ] || echo "$said"
    [ $code = 0 ] || echo "megamix: node $SLURMD_NODENAME cannot run this job (exit code $code): ${said##*$'"'\\n'"'}" >&2
    exit $code' - ${inside[@]+"${inside[@]}"} "$python" -m megamix doctor "$@" --ranks $((nodes * tasks)) && return
  [ -z "$asked" ] || requeue "asked to stop before the first step"
  say "the job ends before its first step: see what the nodes said above. It is not requeued."
  exit 2
}

ranks() {
  local one=(${inside[@]+"${inside[@]}"} "$python" -m megamix "$@")
  local options=(--output="${logs//%/%%}/$SLURM_JOB_ID-%N.log" --open-mode=append)
  [ -z "$asked" ] || requeue "asked to stop before the first step"
  case ${MEGAMIX_LAUNCHER:-srun} in
    srun)
      step "${options[@]}" --label --ntasks=$((nodes * tasks)) --cpus-per-task="$cpus" \
        bash "$MEGAMIX_SLURM/rank.sh" "${one[@]}"
      ;;
    torchrun)
      local torchrun=("$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$tasks"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
      MEGAMIX_CPUS=$cpus step "${options[@]}" --ntasks="$nodes" --cpus-per-task=$((cpus * tasks)) \
        bash "$MEGAMIX_SLURM/torchrun.sh" "${torchrun[@]}" -- "${one[@]}"
      ;;
    *)
      say "MEGAMIX_LAUNCHER is '$MEGAMIX_LAUNCHER', expected srun or torchrun."
      return 2
      ;;
  esac
}

once() {
  [ -z "$asked" ] || requeue "asked to stop before it began"
  nodes=1 step --ntasks=1 --cpus-per-task=$((cpus * tasks)) bash "$MEGAMIX_SLURM/rank.sh" --alone \
    ${inside[@]+"${inside[@]}"} "$python" -m megamix "$@"
}

end_job() {
  local code=$1
  # srun returns the highest code of all ranks, torchrun 1: neither is the code of the rank that failed first.
  if [ -e "$MEGAMIX_OUTCOME" ]; then
    read -r code <"$MEGAMIX_OUTCOME"
    rm -f "$MEGAMIX_OUTCOME"
  fi
  case $code in
    75) requeue "asked to stop" ;;
    0) say "done" ;;
    *)
      say "ended with exit code $code; what the ranks said last:"
      grep -h 'megamix: ' "$logs/$SLURM_JOB_ID"-*.log 2>/dev/null | tail -n 8 || :
      ;;
  esac
  exit "$code"
}

# requeue REASON: ends this start of the job; the next goes on from the newest checkpoint.
requeue() {
  local state limit=${MEGAMIX_MAX_REQUEUES:-50}
  state=$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null || :)
  if [ "$state" != RUNNING ]; then
    say "$1; Slurm ends this start of the job itself: if by scancel, submit it again to go on; else it is requeued."
  elif ((restart >= limit)); then
    say "$1; requeued $restart times, the limit (MEGAMIX_MAX_REQUEUES). Submit it again to go on."
  else
    say "$1; the job is requeued and goes on from the newest checkpoint"
    scontrol requeue "$job" || say "Slurm does not requeue it. Submit it again to go on."
  fi
  exit 75
}
