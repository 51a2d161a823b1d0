#!/usr/bin/env bash
# bash long_test.sh ${k_sparsity} ${v_sparsity} ${model} ${mode} [options]      (--help lists them)
# The Python is $PYTHON if set, else the repository's .venv, else python3.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    python="$here/../.venv/bin/python"
    [[ -x "$python" ]] || python=python3
fi
exec "$python" "$here/pred_long_bench.py" "$@"
