"""Trains a Sphere Confidence Face model: ``deepspeed train.py --stage backbone|confidence ...``; see ``--help``."""

from scf_fast.distributed import leave
from scf_fast.train import main

if __name__ == "__main__":
    leave(main())
