"""The command ``python -m bench.instructions``; its code is in ``bench.kernels.instructions``."""

import sys

from bench.kernels.instructions import main

if __name__ == "__main__":
    sys.exit(main())
