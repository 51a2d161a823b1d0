"""Predict RULER: `python pred_ruler.py K_SPARSITY V_SPARSITY MODEL MODE [options]` (or --help)."""

import sys

from benchmarks.ruler.predict import main

if __name__ == "__main__":
    sys.exit(main())
