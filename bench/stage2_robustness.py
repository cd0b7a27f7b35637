"""The command ``python -m bench.stage2_robustness``; its code is in ``bench.training.stage2_robustness``."""

import sys

from bench.training.stage2_robustness import main

if __name__ == "__main__":
    sys.exit(main())
