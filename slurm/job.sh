# shellcheck shell=bash
# What a job does on its first node: starts the ranks of all nodes, and requeues itself when they were stopped. Sourced by *.sbatch.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# run_job STAGE [NAME=VALUE ...] CONFIG [--section.field value ...]
run_job() {
  local output
  stage=$1
  shift
  read_settings "$@"
  [ ${#words[@]} -gt 0 ] || fail "no config given; usage: sbatch slurm/$stage.sbatch [NAME=VALUE ...] CONFIG [--section.field value ...]"
  # USR1 is for the ranks. TERM ends the job: this shell then waits for the ranks, and requeues nothing.
  trap '' USR1
  trap 'is_ended=1' TERM
  is_ended=''
  enter_environment
  if [ -n "$(setting array)" ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    member_words "$SLURM_ARRAY_TASK_ID"
  fi
  output=$(resolved output) || exit 2
  logs="$output/logs/$stage-$SLURM_JOB_ID"
  mkdir -p "$logs"
  begin_life
  run_to_end
}

# look_at STAGE: sets `state` (ended, stopped, waiting or unfinished), `mark` (a word that changes with its progress) and `stopped_at`.
look_at() {
  local line
  line=$("${gsae[@]}" status --stage "$1" --brief "${words[@]}" 2>/dev/null) || line='unknown unknown'
  read -r state mark stopped_at <<<"$line"
}

# begin_life: ends a job that was requeued again and again without getting any further. The file `progress` has the mark, and how often the
# job had been requeued when it came so far.
begin_life() {
  local since='' known='' restarts=${SLURM_RESTART_COUNT:-0}
  state='' mark='' stopped_at=''
  [ "$restarts" -gt 0 ] || return 0
  look_at "$stage"
  if [ -e "$logs/progress" ]; then
    read -r since known <"$logs/progress"
  fi
  if [ "$known" != "$mark" ]; then
    echo "$restarts $mark" >"$logs/progress"
  elif [ $((restarts - since)) -ge "$(setting max_idle_lives)" ]; then
    fail "$stage: given up, since job $SLURM_JOB_ID got no further in its last $((restarts - since)) lives; look at $logs, mend the cause and" \
      "submit it again"
  fi
}

# run_to_end: the stage; where training waits for parts of the store, it and the harvest take turns.
run_to_end() {
  local code before='' waited_at='' lost
  while true; do
    before=$stopped_at code=0
    start_ranks "$stage" || code=$?
    look_at "$stage"
    if [ "$stage" = train ] && [ "$state" = waiting ] && [ "$code" -eq 0 ] && [ "$mark" != "$waited_at" ] && [ -z "$is_ended" ]; then
      waited_at=$mark
      start_ranks harvest || code=$?
      look_at harvest
      [ "$state" = stopped ] || [ "$code" -ne 0 ] || continue
    fi
    [ "$state" != ended ] || exit 0
    [ -z "$is_ended" ] || exit "$code"
    # Launchers' exit codes say little: a stop since the ranks were started is on the disk.
    [ "$state" != stopped ] || [ "$stopped_at" = "$before" ] || requeue "stopped on request"
    [ "$code" -ne 0 ] || exit 0
    lost=$(find_lost_nodes)
    [ -z "$lost" ] || requeue "node $lost does not answer"
    exit "$code"
  done
}

# start_ranks STAGE: on all nodes; the exit code is 2 after a mistake of the user's, as without Slurm.
start_ranks() {
  local first address port
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Nodes need not be known by name outside of Slurm. The port differs between jobs and between lives of a job.
  address=$(scontrol show node --oneliner "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  port=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))
  # shellcheck disable=SC2046
  GSAE_LOGS=$logs srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --kill-on-bad-exit=0 --wait=60 $(setting srun_options) \
    bash "$root/slurm/node.sh" "$1" "$address" "$port" ${given[@]+"${given[@]}"} "${words[@]}"
}

# find_lost_nodes: the nodes of this job on which nothing can be started.
find_lost_nodes() {
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    timeout 30 srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 --mem=0 --nodelist="$node" true >/dev/null 2>&1 || echo "$node"
  done | paste -sd ' '
}

# requeue WHY: this job again, with the same id; Slurm ends this shell.
requeue() {
  echo "slurm: $stage: $1, requeued after life $((${SLURM_RESTART_COUNT:-0} + 1))"
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" || fail "Slurm would not requeue job $SLURM_JOB_ID; submit the same again, and it continues from there"
  sleep 300
  exit 1
}
