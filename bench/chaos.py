"""``python -m bench.chaos``: see :mod:`bench.robustness.chaos`."""

import sys

from bench.robustness.chaos import main

if __name__ == "__main__":
    sys.exit(main())
