"""Predict and report the configurations of a table: `python sweep.py sweeps/paper.yaml --model MODEL`."""

import sys

from benchmarks.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
