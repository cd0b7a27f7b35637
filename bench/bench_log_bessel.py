"""The benchmark ``python -m pytest bench/bench_log_bessel.py``; its code is in ``bench.kernels.log_bessel``."""

from bench.kernels.log_bessel import test_log_bessel

__all__ = ["test_log_bessel"]
