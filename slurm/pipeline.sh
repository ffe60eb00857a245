#!/usr/bin/env bash
# Submits all stages of one config as jobs that wait for each other, and prints their ids.
#   bash slurm/pipeline.sh [NAME=VALUE ...] CONFIG [--section.field value ...]
# Settings are in env.sh. With array=FILE each line of FILE is a member: train and evaluate are arrays, each member with its own words, its
# own output <output>/<number>, and the same store; the report is of all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage="usage: bash slurm/pipeline.sh [NAME=VALUE ...] CONFIG [--section.field value ...]"
read_settings "$@"
[ ${#words[@]} -gt 0 ] || fail "no config given; $usage"
command -v sbatch >/dev/null || fail "there is no sbatch here; run this where jobs are submitted, or launch/pipeline.sh without Slurm"
enter_environment
output=$(resolved output) || exit 2
members=''
if [ -n "$(setting array)" ]; then
  [ -r "$(setting array)" ] || fail "array is $(setting array), which cannot be read; give a file with a line of settings for each member"
  count=$(grep -cv '^[[:space:]]*\(#\|$\)' "$(setting array)" || true)
  [ "$count" -gt 0 ] || fail "array is $(setting array), which has no line; give a line of settings for each member"
  base=("${words[@]}")
  for ((number = 0; number < count; number++)); do
    member_words "$number"
    parts=$(resolved corpus.parts)
    words=("${base[@]}")
  done
  [ "$parts" -eq 1 ] || fail "array does not go with corpus.parts, since training removes the parts that it has used; set one of the two"
  members="0-$((count - 1))$([ -z "$(setting at_once)" ] || echo "%$(setting at_once)")"
fi
mkdir -p "$output/logs"
logs=$(cd "$output/logs" && pwd)

# submit STAGE [sbatch option ...]: prints the job's id.
submit() {
  local stage=$1 options=() value name ranks
  shift
  ranks=$(ranks_on_a_node)
  for name in partition account qos mem time; do
    value=$(setting $name)
    [ -z "$value" ] || options+=("--$name=$value")
  done
  if [ "$stage" != report ]; then
    options+=("--nodes=$(setting nodes)" "--cpus-per-task=$((ranks * $(setting cpus_per_rank)))" "--signal=USR1@$(setting signal_seconds)")
    [ "$(setting gpus_per_node)" -eq 0 ] || options+=("--gpus-per-node=$(setting gpus_per_node)")
  fi
  # shellcheck disable=SC2046
  sbatch --parsable "${options[@]}" --output="${logs//%/%%}/%x-%j.out" --kill-on-invalid-dep=yes $(setting sbatch_options) "$@" \
    "$root/slurm/$stage.sbatch" ${given[@]+"${given[@]}"} "${words[@]}" | cut -d ';' -f 1
}

harvest=$(submit harvest)
echo "harvest  $harvest"
if [ -z "$members" ]; then
  train=$(submit train --dependency="afterok:$harvest")
  echo "train    $train"
  evaluate=$(submit evaluate --dependency="afterok:$train")
else
  train=$(submit train --dependency="afterok:$harvest" --array="$members")
  echo "train    $train ($count members)"
  evaluate=$(submit evaluate --dependency="aftercorr:$train" --array="$members")
fi
echo "evaluate $evaluate"
report=$(submit report --dependency="afterok:$evaluate")
echo "report   $report"
echo "logs     $logs"
