"""``python -m bench.throughput``: see :mod:`bench.training.throughput`."""

import sys

from bench.training.throughput import main

if __name__ == "__main__":
    sys.exit(main())
