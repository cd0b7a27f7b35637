"""The benchmark ``python -m pytest bench/bench_scf_loss.py``; its code is in ``bench.kernels.scf_loss``."""

from bench.kernels.scf_loss import test_scf_loss

__all__ = ["test_scf_loss"]
