"""Score RULER predictions: `python eval_ruler.py --model FOLDER`."""

import sys

from benchmarks.ruler.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
