"""``python -m pytest bench/bench_scoring.py``: see :mod:`bench.scoring.scoring`."""

from bench.scoring.scoring import *  # noqa: F403
