"""``python -m pytest bench/bench_stage1.py``: see :mod:`bench.training.stage1`."""

from bench.training.stage1 import *  # noqa: F403
