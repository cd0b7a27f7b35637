"""The command ``python -m bench.scaling``; its code is in ``bench.training.scaling``."""

import sys

from bench.training.scaling import main

if __name__ == "__main__":
    sys.exit(main())
