#!/usr/bin/env bash
# The demo: kernel evaluation, then the bundled model on the bundled data, dense and pruned, to a table and plots.
#   bash run.sh [output folder]        PYTHON names the interpreter; PLAN the configurations (sweeps/demo.yaml)
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
eval_dir="$(dirname "$here")"
out="${1:-$eval_dir/../build/out/demo}"
python="${PYTHON:-python3}"
mkdir -p "$out"

echo "== 1/2 kernel evaluation: right first, then fast, then small"
"$python" "$eval_dir/../kernel/kernel_evaluation.py" --json "$out/kernel_evaluation.json"

echo
echo "== 2/2 the bundled model: predicted dense, then with K and V pruned, and scored"
"$python" "$eval_dir/sweep.py" "${PLAN:-$eval_dir/sweeps/demo.yaml}" --model "$here/demo-llama" \
  --data_dir "$here/data" --output_dir "$out" --report "$out/report"
echo "kernel figures: $out/kernel_evaluation.json"
