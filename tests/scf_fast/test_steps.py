"""Commands that are started end with the one that starts them, whatever they do against it."""

import sys
import time

from scf_fast import steps


def test_a_command_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(steps, "_END_SECONDS", 0.2)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    process = steps._Process(steps.Step("deaf", "deaf", lambda: [sys.executable, "-c", deaf]), prefix="[deaf] ")
    time.sleep(0.5)
    began = time.monotonic()
    process.end()
    assert time.monotonic() - began < 10 and process.poll() in (-9, -15)
