"""``python -m pytest bench/bench_scf_loss.py``: see :mod:`bench.kernels.scf_loss`."""

from bench.kernels.scf_loss import *  # noqa: F403
