#!/usr/bin/env bash
# What each node of a job does: one launcher, and below it this node's ranks. Started by srun, once a node.
#   bash slurm/node.sh STAGE RENDEZVOUS_ADDRESS PORT [NAME=VALUE ...] CONFIG [--section.field value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
stage=$1 address=$2 port=$3
shift 3
read_settings "$@"

# Slurm signals every process of the step. The ranks stop on USR1; launchers would die of it and leave them behind, so they ignore it, and
# so do ranks until they are at work: this shell keeps the request for them. When all are to end, it waits for them: with it the step would
# be over.
export GSAE_TOLD=$GSAE_LOGS/told-${SLURM_RESTART_COUNT:-0}
trap 'touch "$GSAE_TOLD"' USR1
trap : TERM

# run COMMAND...: in the background, since traps wait for what is in the foreground; its exit code.
run() {
  local code=0 child
  (trap '' USR1 && exec "$@") &
  child=$!
  wait "$child" || code=$?
  while [ "$code" -gt 128 ] && kill -0 "$child" 2>/dev/null; do # a signal ends the wait
    code=0
    wait "$child" || code=$?
  done
  return "$code"
}

enter_environment
nodes=${SLURM_STEP_NUM_NODES:-1} ranks=$(ranks_on_a_node)
threads=$((SLURM_CPUS_PER_TASK > ranks ? SLURM_CPUS_PER_TASK / ranks : 1))
if [ $((nodes * ranks)) -eq 1 ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
  code=0
  run "${gsae[@]}" "$stage" "${words[@]}" || code=$?
  exit "$code"
fi
# What the launcher says is its own; the ranks write where console.py sends them. It returns 1 whatever a rank did: 2 stands in its report.
log=$GSAE_LOGS/launcher-${SLURMD_NODENAME:-$(hostname)}.log
before=$(stat --format=%s "$log" 2>/dev/null || echo 0) code=0
run "${python[@]}" -m accelerate.commands.launch --config_file "$root/launch/accelerate/multi_node.yaml" --rdzv_backend static \
  --num_machines "$nodes" --num_processes "$((nodes * ranks))" --machine_rank "$SLURM_NODEID" --main_process_ip "$address" \
  --main_process_port "$port" --num_cpu_threads_per_process "$threads" -m gsae "$stage" "${words[@]}" 2>>"$log" || code=$?
if [ "$code" -ne 0 ] && tail -c "+$((before + 1))" "$log" | grep -q 'exitcode *: 2 '; then
  code=2
elif [ "$code" -ne 0 ]; then
  echo "slurm: $stage on ${SLURMD_NODENAME:-$(hostname)}: the launcher ended with exit code $code ($log)"
fi
exit "$code"
