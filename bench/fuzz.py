"""``python -m bench.fuzz``: see :mod:`bench.robustness.fuzz`."""

import sys

from bench.robustness.fuzz import main

if __name__ == "__main__":
    sys.exit(main())
