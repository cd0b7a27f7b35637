"""The benchmark ``python -m pytest bench/bench_stage1.py``; its code is in ``bench.training.stage1``."""

from bench.training.stage1 import test_stage1

__all__ = ["test_stage1"]
