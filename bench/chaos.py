"""The command ``python -m bench.chaos``; its code is in ``bench.robustness.chaos``."""

import sys

from bench.robustness.chaos import main

if __name__ == "__main__":
    sys.exit(main())
