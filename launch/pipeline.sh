#!/usr/bin/env bash
# All four stages of one config: harvest, train, evaluate, report.
#   bash launch/pipeline.sh CONFIG [NUM_RANKS] [--section.field value ...]
# With one rank the stages run as plain processes; with more, accelerate starts them on this host
# (ACCELERATE_CONFIG chooses the launch config; by default GPUs where there are some, else CPU ranks).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage="usage: bash launch/pipeline.sh CONFIG [NUM_RANKS] [--section.field value ...]"
config=${1:?$usage}
shift
num_ranks=1
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  num_ranks=$1
  shift
fi

python=python3
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"

run_stage() {
  local stage=$1
  shift
  if [ "$num_ranks" -eq 1 ]; then
    "$python" -m gsae "$stage" "$config" "$@"
  else
    "$python" -m accelerate.commands.launch --config_file "$accelerate_config" --num_processes "$num_ranks" \
      -m gsae "$stage" "$config" "$@"
  fi
}

if [ "$num_ranks" -gt 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then
  if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    accelerate_config="$root/launch/accelerate/ddp.yaml"
  else
    accelerate_config="$root/launch/accelerate/cpu.yaml"
  fi
else
  accelerate_config=${ACCELERATE_CONFIG:-}
fi

for stage in harvest train evaluate; do
  run_stage "$stage" "$@"
done
"$python" -m gsae report "$config" "$@"
