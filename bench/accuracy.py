"""The command ``python -m bench.accuracy``; its code is in ``bench.kernels.accuracy``."""

import sys

from bench.kernels.accuracy import main

if __name__ == "__main__":
    sys.exit(main())
