"""``python -m bench.big_head``: see :mod:`bench.training.big_head`."""

import sys

from bench.training.big_head import main

if __name__ == "__main__":
    sys.exit(main())
