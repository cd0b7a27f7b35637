"""The benchmark ``python -m pytest bench/bench_margin_softmax.py``; its code is in ``bench.kernels.margin_softmax``."""

from bench.kernels.margin_softmax import test_margin_softmax

__all__ = ["test_margin_softmax"]
