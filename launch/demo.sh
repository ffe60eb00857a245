#!/usr/bin/env bash
# Sets everything up and runs the main job on real input: harvest -> train -> evaluate -> report, on SmolLM2-135M
# (a 30-layer Llama) and 106 Wikipedia articles. A second call resumes what is there and does nothing twice.
#   bash launch/demo.sh [--model NAME] [--section.field value ...]
# --model meta-llama/Llama-2-7b-hf (with a Hugging Face login) runs the same on another Llama, under runs/demo-Llama-2-7b-hf.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=()
while [ $# -gt 0 ]; do
  case $1 in
    --model)
      options+=(--llm.model "${2:?--model needs a name}" --output "runs/demo-$(basename "$2")")
      shift 2
      ;;
    *)
      options+=("$1")
      shift
      ;;
  esac
done

bash launch/setup.sh
.venv/bin/python launch/prepare_demo.py runs/assets
# On CPUs two ranks of one thread read the LLM faster than one rank of two threads; the runs of a site train together in one process.
ranks=1
if [ ! -e /dev/nvidiactl ] && [ "$(nproc)" -gt 1 ]; then
  ranks=2
fi
# A CPU without instructions for bfloat16 products takes a hundred times as long for them.
quick='import torch; from gsae.sae.products import is_quick_at_bfloat16; print(is_quick_at_bfloat16(torch.device("cpu")))'
if [ ! -e /dev/nvidiactl ] && [ "$(.venv/bin/python -c "$quick")" = False ]; then
  options=(--llm.dtype float32 "${options[@]}")
fi
TRAIN_RANKS=1 bash launch/pipeline.sh configs/demo.yaml "$ranks" "${options[@]}"
