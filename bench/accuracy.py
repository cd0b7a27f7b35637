"""``python -m bench.accuracy``: see :mod:`bench.measuring.accuracy`."""

import sys

from bench.measuring.accuracy import main

if __name__ == "__main__":
    sys.exit(main())
