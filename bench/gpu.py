"""``python -m bench.gpu``: the suite (``bench.suite``) with all of its flags, for a GPU only.

Without one it stops with an error, unless ``--tiny`` tries it out on the CPU.
"""

import sys

from bench.suite import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m bench.gpu", gpu_only=True))
