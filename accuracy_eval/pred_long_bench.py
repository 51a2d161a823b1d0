"""Predict LongBench: `python pred_long_bench.py K_SPARSITY V_SPARSITY MODEL MODE [options]` (or --help)."""

import sys

from benchmarks.longbench.predict import main

if __name__ == "__main__":
    sys.exit(main())
