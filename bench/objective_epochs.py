"""The command ``python -m bench.objective_epochs``; its code is in ``bench.training.objective_epochs``."""

import sys

from bench.training.objective_epochs import main

if __name__ == "__main__":
    sys.exit(main())
