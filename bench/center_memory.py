"""The command ``python -m bench.center_memory``; its code is in ``bench.training.center_memory``."""

import sys

from bench.training.center_memory import main

if __name__ == "__main__":
    sys.exit(main())
