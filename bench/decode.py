"""The command ``python -m bench.decode``; its code is in ``bench.input.decode``."""

import sys

from bench.input.decode import main

if __name__ == "__main__":
    sys.exit(main())
