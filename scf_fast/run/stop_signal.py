"""Signals that ask a run to stop after its step."""

import signal
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_IMPATIENT_SECONDS = 2.0  # launchers pass one Ctrl-C on as two signals at once


class StopSignal:
    """A request to stop at the end of the step: SIGTERM, SIGINT or SIGUSR1, as schedulers send them before they kill.

    A later SIGINT, 2 s after the first or more, ends the process at once. Use it as a context manager, in the main
    thread.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _IMPATIENT_SECONDS:
            raise KeyboardInterrupt
