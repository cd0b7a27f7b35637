"""The suite (see bench.suite) on a GPU, with all of its arguments; without one it says so and does nothing, unless
--tiny tries it out.
"""

import sys

from bench.measuring.environment import DEVICE
from bench.suite import main

if __name__ == "__main__":
    if DEVICE != "cuda" and not {"--tiny", "--help", "-h", "--list"} & set(sys.argv):
        sys.exit(
            "python -m bench.gpu needs a CUDA device and found none; python -m bench.suite runs on the CPU, --tiny "
            "tries this out on it"
        )
    sys.exit(main(prog="python -m bench.gpu"))
