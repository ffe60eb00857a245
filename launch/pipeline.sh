#!/usr/bin/env bash
# All four stages of one config: harvest, train, evaluate, report. With corpus.parts harvest and train take turns until training ends.
#   bash launch/pipeline.sh CONFIG [NUM_RANKS] [--section.field value ...]
# With one rank the stages run as plain processes; with more, accelerate starts them on this host.
# ACCELERATE_CONFIG chooses the launch config (by default GPUs where there are some, else CPU ranks);
# TRAIN_RANKS the number of ranks that train, where it is not to be NUM_RANKS.
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

accelerate_config=${ACCELERATE_CONFIG:-}
if [ -z "$accelerate_config" ]; then
  accelerate_config="$root/launch/accelerate/cpu.yaml"
  if [ -e /dev/nvidiactl ]; then
    accelerate_config="$root/launch/accelerate/ddp.yaml"
  fi
fi

# run_stage STAGE RANKS [--section.field value ...]
run_stage() {
  local stage=$1 ranks=$2
  shift 2
  if [ "$ranks" -eq 1 ]; then
    "$python" -m gsae "$stage" "$config" "$@"
  else
    # Launchers turn a rank's exit code 2 into 1 and add a traceback of their own; after our line, that says nothing.
    { "$python" -m accelerate.commands.launch --config_file "$accelerate_config" --num_processes "$ranks" --main_process_port 0 \
      -m gsae "$stage" "$config" "$@" 2>&1 1>&3 3>&- |
      awk '/^gsae: / { print; said = 1 } !said { print } { fflush() } END { exit said ? 2 : 0 }' >&2; } 3>&1
  fi
}

run_stage harvest "$num_ranks" "$@"
run_stage train "${TRAIN_RANKS:-$num_ranks}" "$@"
output=$("$python" -c 'import sys; from gsae.settings import read_config; print(read_config("train", sys.argv[1:]).output)' "$config" "$@")
before=
# The file says for which part training waits; it ends when that is no longer another one than before.
while [ -e "$output/waiting.json" ] && [ "$(cat "$output/waiting.json")" != "$before" ]; do
  before=$(cat "$output/waiting.json")
  run_stage harvest "$num_ranks" "$@"
  run_stage train "${TRAIN_RANKS:-$num_ranks}" "$@"
done
run_stage evaluate "$num_ranks" "$@"
"$python" -m gsae report "$config" "$@"
