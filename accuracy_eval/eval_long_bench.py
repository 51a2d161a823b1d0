"""Score LongBench predictions: `python eval_long_bench.py --model FOLDER [--e]`."""

import sys

from benchmarks.longbench.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
