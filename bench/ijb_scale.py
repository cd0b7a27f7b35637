"""The command ``python -m bench.ijb_scale``; its code is in ``bench.scoring.ijb_scale``."""

import sys

from bench.scoring.ijb_scale import main

if __name__ == "__main__":
    sys.exit(main())
