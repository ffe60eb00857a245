# shellcheck shell=bash
# Every setting of the Slurm jobs: its meaning, its default, and how it is given. Sourced by the other scripts here.
#
# A setting is given as a word NAME=VALUE before CONFIG, to pipeline.sh or after the script's name to sbatch:
#   bash slurm/pipeline.sh partition=gpu nodes=2 gpus_per_node=8 time=12:00:00 evaluate.nodes=1 CONFIG --train.groups 4
# STAGE.NAME=VALUE (harvest, train, evaluate, report) is for the jobs of one stage. What a cluster always needs goes into a file of such
# words, one a line (# begins a comment), that the environment variable GSAE_SLURM names. Words win over the file, the file over what is here.

declare -A settings=(
  # What a job asks Slurm for. Used by pipeline.sh; with sbatch itself give sbatch's own options instead.
  [nodes]=1           # of each job
  [gpus_per_node]=0   # 0: ranks compute on CPUs
  [ranks_per_node]='' # default: one a GPU, or one
  [cpus_per_rank]=4
  [mem]=''            # of a node, such as 200G; default: the partition's
  [time]=''           # of each life of a job, such as 12:00:00: one that needs longer is requeued and goes on; default: the partition's
  [partition]=''
  [account]=''
  [qos]=''
  [sbatch_options]='' # any others, such as '--constraint=h100 --exclusive'
  [signal_seconds]=120 # how long before the time limit a job is told to stop, so that it saves what it has and is requeued
  [at_once]=''        # of an array, how many members at most run at the same time

  # What runs in it: the Python that has gsae. Of venv, conda and container give at most one; default: .venv beside this directory.
  [modules]=''        # for module load, such as 'cuda/12.4 gcc/13'
  [venv]=''           # directory of a virtual environment
  [conda]=''          # name or path of a conda environment
  [container]=''      # command that runs another one inside, such as 'apptainer exec --nv /images/gsae.sif'
  [setup]=''          # file that is sourced on every node after that, for exports such as NCCL_SOCKET_IFNAME (docs/slurm.md)
  [srun_options]=''   # of the step that starts the ranks, such as '--container-image=gsae' where Slurm itself runs containers

  # What becomes of it.
  [array]=''          # file with a line of --section.field words for each member of a sweep
  [max_idle_lives]=3  # a job that was requeued so many times in a row without getting any further ends
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# fail MESSAGE: one line, exit code 2.
fail() {
  echo "gsae: $*" >&2
  exit 2
}

# read_settings WORD...: takes the settings before CONFIG; the array `given` has those that are not from here, `words` has what follows.
read_settings() {
  local line
  given=()
  if [ -n "${GSAE_SLURM:-}" ]; then
    [ -r "$GSAE_SLURM" ] || fail "GSAE_SLURM is $GSAE_SLURM, which cannot be read; give a file of NAME=VALUE lines"
    while IFS= read -r line; do
      take_setting "$line" "$GSAE_SLURM"
      given+=("$line") # jobs need not find the file
    done < <(sed 's/[[:space:]]*#.*//; s/[[:space:]]*$//; /^$/d' "$GSAE_SLURM")
  fi
  while [[ ${1:-} =~ ^[a-z_.]+= ]]; do
    take_setting "$1" "the command line"
    given+=("$1")
    shift
  done
  words=("$@")
}

# take_setting NAME=VALUE WHERE
take_setting() {
  local name=${1%%=*} value=${1#*=} bare
  bare=$name
  [[ $name =~ ^(harvest|train|evaluate|report)\.(.*)$ ]] && bare=${BASH_REMATCH[2]}
  [[ $1 == *=* && -v "settings[$bare]" ]] || fail "there is no setting $name ($2); slurm/env.sh lists them: ${!settings[*]}"
  case $bare in
    nodes | ranks_per_node | cpus_per_rank | max_idle_lives | at_once)
      [[ $value =~ ^[1-9][0-9]*$ ]] || fail "$name is '$value' ($2); give a number from 1 on" ;;
    gpus_per_node | signal_seconds)
      [[ $value =~ ^[0-9]+$ ]] || fail "$name is '$value' ($2); give a number from 0 on" ;;
  esac
  settings[$name]=$value
}

# setting NAME: its value for the jobs of $stage.
setting() {
  printf '%s' "${settings[${stage:-}.$1]-${settings[$1]}}"
}

# enter_environment: makes the array `gsae` the command, for this shell.
enter_environment() {
  local venv conda container module file
  venv=$(setting venv) conda=$(setting conda) container=$(setting container)
  if [ -n "$(setting modules)" ]; then
    for file in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh /usr/share/lmod/lmod/init/bash /usr/share/modules/init/bash; do
      # shellcheck source=/dev/null
      [ "$(type -t module)" = function ] || { [ -r "$file" ] && source "$file"; } || true
    done
    [ "$(type -t module)" = function ] || fail "modules is '$(setting modules)', but $(hostname) has no module command"
    for module in $(setting modules); do
      module load "$module" || fail "module load $module failed on $(hostname)"
    done
  fi
  if [ -n "$conda" ]; then
    command -v conda >/dev/null || fail "conda is '$conda', but $(hostname) has no conda command; load it with modules or setup"
    set +u
    eval "$(conda shell.bash hook)"
    conda activate "$conda" || fail "conda activate $conda failed on $(hostname)"
    set -u
  elif [ -z "$container" ]; then
    [ -n "$venv" ] || venv=$root/.venv
    [ -x "$venv/bin/python" ] || fail "$venv/bin/python is not there on $(hostname); give venv=, conda= or container= (slurm/env.sh)"
    PATH=$venv/bin:$PATH
  fi
  if [ -n "$(setting setup)" ]; then
    [ -r "$(setting setup)" ] || fail "setup is $(setting setup), which $(hostname) cannot read"
    # shellcheck source=/dev/null
    source "$(setting setup)"
  fi
  read -ra container <<<"$container"
  python=(${container[@]+"${container[@]}"} python)
  # shellcheck disable=SC2034
  gsae=("${python[@]}" -m gsae)
}

# ranks_on_a_node: how many this job starts on each.
ranks_on_a_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-$(setting gpus_per_node)} ranks
  ranks=$(setting ranks_per_node)
  [ -n "$ranks" ] || { [ "$gpus" -gt 0 ] && ranks=$gpus; } || ranks=1
  printf '%s' "$ranks"
}

# resolved NAME: a value of the config in `words`, such as `output` or `corpus.parts`.
resolved() {
  "${python[@]}" -c '
import sys
from operator import attrgetter
from gsae.errors import GsaeError
from gsae.settings import read_config
try:
    print(attrgetter(sys.argv[1])(read_config("status", sys.argv[2:])))
except GsaeError as error:
    sys.exit(f"gsae: {error}")
' "$1" "${words[@]}" || exit 2
}

# member_words NUMBER: adds the words of a member of the array, with an output of its own below the config's and the store of all.
member_words() {
  local line output store
  line=$(grep -v '^[[:space:]]*\(#\|$\)' "$(setting array)" | sed -n "$(($1 + 1))p")
  output=$(resolved output) || exit 2
  store=$(resolved store_directory) || exit 2
  mapfile -d '' -t line < <(xargs printf '%s\0' <<<"$line")
  words+=("${line[@]}" --output "$output/$1" --harvest.store "$store")
}
