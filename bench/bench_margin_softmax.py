"""``python -m pytest bench/bench_margin_softmax.py``: see :mod:`bench.kernels.margin_softmax`."""

from bench.kernels.margin_softmax import *  # noqa: F403
