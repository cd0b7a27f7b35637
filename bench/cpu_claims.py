"""``python -m bench.cpu_claims``: see :mod:`bench.kernels.cpu_claims`."""

import sys

from bench.kernels.cpu_claims import main

if __name__ == "__main__":
    sys.exit(main())
