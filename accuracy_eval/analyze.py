"""Look into a model's KV cache: `python analyze.py MODEL --file prompt.txt`."""

import sys

from benchmarks.analysis.command import main

if __name__ == "__main__":
    sys.exit(main())
