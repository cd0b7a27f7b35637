"""The command ``python -m bench.cpu_claims``; its code is in ``bench.kernels.cpu_claims``."""

import sys

from bench.kernels.cpu_claims import main

if __name__ == "__main__":
    sys.exit(main())
