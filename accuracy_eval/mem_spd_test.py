"""Memory and speed of generation: `python mem_spd_test.py [--model llama-3-8b] [options]` (or --help)."""

import sys

from benchmarks.speed.cli import main

if __name__ == "__main__":
    sys.exit(main())
