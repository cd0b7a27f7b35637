"""Trains a Sphere Confidence Face model: ``deepspeed train.py --stage backbone|confidence ...``; see ``--help``."""

from scf_fast import train

if __name__ == "__main__":
    train.distributed.leave(train.main())
