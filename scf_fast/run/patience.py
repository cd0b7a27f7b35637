"""Early stop: a run ends when a loss has not fallen for some epochs."""

import math


class Patience:
    """Counts epochs without a lower loss.

    Args:
        limit: it is over after this many in a row.
    """

    def __init__(self, limit: int):
        self.limit, self._best, self._waited = limit, math.inf, 0

    def add(self, loss: float) -> None:
        """Takes note of an epoch's loss; one that is not a number is no lower one."""
        if loss < self._best:
            self._best, self._waited = loss, 0
        else:
            self._waited += 1

    @property
    def is_over(self) -> bool:
        return self._waited >= self.limit

    def state(self) -> list[float] | None:
        """Returns what :meth:`restore` takes; None before the first loss."""
        return [self._best, float(self._waited)] if math.isfinite(self._best) else None

    def restore(self, state: list[float]) -> None:
        self._best, self._waited = state[0], int(state[1])
