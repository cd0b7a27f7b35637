"""The command ``python -m bench.fuzz``; its code is in ``bench.robustness.fuzz``."""

import sys

from bench.robustness.fuzz import main

if __name__ == "__main__":
    sys.exit(main())
