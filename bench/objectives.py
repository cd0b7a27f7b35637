"""The command ``python -m bench.objectives``; its code is in ``bench.kernels.objectives``."""

import sys

from bench.kernels.objectives import main

if __name__ == "__main__":
    sys.exit(main())
