"""The command ``python -m bench.stage2_recipes``; its code is in ``bench.training.stage2_recipes``."""

import sys

from bench.training.stage2_recipes import main

if __name__ == "__main__":
    sys.exit(main())
