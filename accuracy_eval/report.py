"""Set prediction runs side by side, tables and plots: `python report.py pred/A pred/B --report DIR`."""

import sys

from benchmarks.report.command import main

if __name__ == "__main__":
    sys.exit(main())
