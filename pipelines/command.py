"""How every command of the project parses its arguments and ends: one prefix, one line, one exit status."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from scf_fast.pipelines.errors import InputError

INPUT_ERROR = 2  # exit status of a command whose input cannot be used; argparse has the same
INTERRUPTED = 130  # of one that Ctrl-C has ended: 128 + SIGINT
TRACEBACK_VARIABLE = "SCF_FAST_TRACEBACK"  # set to 1, it shows where an error arose
_RANK_0_SPEAKS_FIRST = 3.0  # seconds


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes hyphens for underscores in flags and the other way round, and whose errors are
    one line.
    """

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        return super().parse_known_args(self._spelled_as_declared(sys.argv[1:] if args is None else args), namespace)

    def _spelled_as_declared(self, arguments: Sequence[str]) -> list[str]:
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        spelled, flags_end = [], False
        for argument in arguments:
            flags_end = flags_end or argument == "--"
            name, equals, value = argument.partition("=")
            if name.startswith("--") and not flags_end and name not in self._option_string_actions:
                argument = declared.get(name.replace("_", "-"), name) + equals + value
            spelled.append(argument)
        return spelled

    def error(self, message: str) -> NoReturn:
        self.exit(INPUT_ERROR, f"{self.prog}: error: {message}\n")


def run(prog: str, action: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status.

    An :class:`InputError` or OSError ends it with ``PROG: error: MESSAGE`` on one line of standard error and status 2,
    unless ``SCF_FAST_TRACEBACK=1`` asks for the traceback. Any other exception is a bug and keeps its traceback.

    Args:
        prog: the command as the user has typed it.
        action: does the work; its return value is the status, None is 0.
    """
    try:
        return action() or 0
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (InputError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if int(os.environ.get("RANK", 0)):
            # As a rule rank 0 has the same error, prints it, and the launcher ends this rank meanwhile.
            time.sleep(_RANK_0_SPEAKS_FIRST)
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return INPUT_ERROR
