"""The command ``python -m bench.big_head``; its code is in ``bench.training.big_head``."""

import sys

from bench.training.big_head import main

if __name__ == "__main__":
    sys.exit(main())
