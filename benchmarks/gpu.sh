#!/usr/bin/env bash
# All that a GPU is to show, in one command and under ten minutes on one card: the tests that need one, the kernels' tests on the card,
# steps against rivals (those that are installed), a training to its end with each kind of products, and the harvest.
#   bash benchmarks/gpu.sh [folder for gpu.json, gpu.md, quality.jsonl and the logs]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

out=${1:-runs/gpu}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu: torch sees no CUDA device here; run this on a machine with a card" >&2
  exit 2
}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

echo "== tests"
timeout 150 "$python" -m pytest -q -m "gpu" -p no:cacheprovider tests/sae tests/train tests/store tests/harvest tests/test_plan.py >"$out/tests.log" 2>&1 || failed=1
timeout 120 "$python" -m pytest -q -p no:cacheprovider tests/sae/test_kernels.py tests/train/test_step.py -k "kernels or list or bit" >>"$out/tests.log" 2>&1 || failed=1
grep -E "passed|failed|^FAILED|^ERROR" "$out/tests.log"

echo "== steps"
timeout 180 "$python" benchmarks/gpu.py --out "$out" 2>"$out/steps.log" || failed=1
tail -n 3 "$out/steps.log"

echo "== quality: the same rows with each kind of products"
: >"$out/quality.jsonl"
for products in float32 tf32 bfloat16; do
  timeout 30 "$python" benchmarks/planted.py --device cuda --features 256 --seeds 0 --products "$products" | tee -a "$out/quality.jsonl" || failed=1
done
timeout 30 "$python" benchmarks/planted.py --device cuda --features 256 --seeds 0 --no-kernels | tee -a "$out/quality.jsonl" || failed=1

echo "== harvest: a random Llama of 0.4 G parameters in bfloat16 reads this repository"
llama=(--llm.dtype bfloat16 --llm.random.num_layers 8 --llm.random.d_model 2048 --llm.random.num_heads 16)
batches=(--harvest.sites '[2, middle, -2]' --harvest.context_length 1024 --harvest.batch_contexts 16)
BENCH_TOKENS=65536 BENCH_LONG_TOKENS=131072 BENCH_ROUNDS=3 timeout 60 "$python" benchmarks/harvest.py configs/smoke.yaml --device cuda \
  "${llama[@]}" "${batches[@]}" | tee "$out/harvest.jsonl" || failed=1

echo "== $([ "$failed" = 0 ] && echo "all ran" || echo "something failed: see $out")"
exit "$failed"
