"""``python -m pytest bench/bench_log_bessel.py``: see :mod:`bench.kernels.log_bessel`."""

from bench.kernels.log_bessel import *  # noqa: F403
