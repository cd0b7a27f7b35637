"""The benchmark ``python -m pytest bench/bench_scoring.py``; its code is in ``bench.scoring.scoring``."""

from bench.scoring.scoring import test_scoring

__all__ = ["test_scoring"]
