"""The command ``python -m bench.first_gpu``; the plan is in ``bench.first_gpu.plan``."""

import sys

from bench.first_gpu.runner import main

if __name__ == "__main__":
    sys.exit(main())
