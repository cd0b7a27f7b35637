"""The command ``python -m bench.throughput``; its code is in ``bench.training.throughput``."""

import sys

from bench.training.throughput import main

if __name__ == "__main__":
    sys.exit(main())
