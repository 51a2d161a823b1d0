#!/usr/bin/env bash
# The demo: kernel evaluation, then the bundled model on the bundled data, dense and pruned, scored and plotted.
#   bash run.sh [output folder]        PYTHON names the interpreter; SPARSITIES the sweep (default "0.5 0.7")
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
eval_dir="$(dirname "$here")"
out="${1:-$eval_dir/../build/out/demo}"
python="${PYTHON:-python3}"
export PYTHON="$python"
mkdir -p "$out"

echo "== 1/3 kernel evaluation: right first, then fast, then small"
"$python" "$eval_dir/../kernel/kernel_evaluation.py" --json "$out/kernel_evaluation.json"

echo
echo "== 2/3 prediction: the bundled model, dense, then with K and V pruned"
predict() { bash "$eval_dir/long_test.sh" "$@" --data_dir "$here/data" --output_dir "$out"; }
predict 0 0 "$here/demo-llama" dense
for sparsity in ${SPARSITIES:-0.5 0.7}; do
  predict "$sparsity" "$sparsity" "$here/demo-llama" mustafar
done

echo
echo "== 3/3 scores"
folders=()
for folder in "$out"/pred/*_dense "$out"/pred/*_K_0.[1-9]*; do
  [[ -d "$folder" ]] || continue
  "$python" "$eval_dir/eval_long_bench.py" --model "$folder" > "$folder/scores.txt"
  folders+=("$folder")
done
"$python" "$eval_dir/summarize.py" "${folders[@]}" --plot "$out/scores.png"
echo "kernel figures: $out/kernel_evaluation.json"
