"""Train a Sphere Confidence Face model: ``deepspeed train.py --stage backbone|confidence ...``; ``--help`` lists the options."""

from scf_fast.distributed import leave
from scf_fast.train import main

if __name__ == "__main__":
    leave(main())
