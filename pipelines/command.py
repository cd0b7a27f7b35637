"""How every command of the project parses its arguments and ends: one prefix, one line, one exit status."""

import argparse
import errno
import getpass
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from scf_fast.pipelines.aliases import StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.text import accept_all_text, one_line, printable

INPUT_ERROR = 2  # exit status of a command whose input cannot be used; argparse has the same
INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT
TRACEBACK_VARIABLE = "SCF_FAST_TRACEBACK"  # set to 1, it shows where an error arose
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANK_0_SPEAKS_FIRST = 3.0  # seconds


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes hyphens for underscores in flags and vice versa; its errors are one line."""

    def parse_known_args(  # type: ignore[override]  # the base is declared as three overloads, one a kind of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        accept_all_text((sys.stdout, sys.stderr))  # --help has letters that not every terminal has
        return super().parse_known_args(self._spelled_as_declared(sys.argv[1:] if args is None else args), namespace)

    def _spelled_as_declared(self, arguments: Sequence[str]) -> list[str]:
        known = self._option_string_actions  # private to argparse; there from Python 3.2 to 3.14
        declared = {flag.replace("_", "-"): flag for flag in known}
        spelled, flags_end = [], False
        for argument in arguments:
            flags_end = flags_end or argument == "--"
            name, equals, value = argument.partition("=")
            if name.startswith("--") and not flags_end and name not in known:
                argument = declared.get(name.replace("_", "-"), name) + equals + value
            spelled.append(argument)
        return spelled

    def error(self, message: str) -> NoReturn:
        self.exit(INPUT_ERROR, f"{self.prog}: error: {one_line(message)}\n")


def run(prog: str, action: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status.

    An :class:`InputError` or OSError ends it with ``PROG: error: MESSAGE`` on one line of standard error and status 2,
    unless ``SCF_FAST_TRACEBACK=1`` asks for the traceback. Any other exception is a bug and keeps its traceback. What
    the terminal's encoding lacks is written in ASCII. Variables of launchers that are empty are taken as unset.

    Args:
        prog: the command as the user has typed it.
        action: does the work; its return value is the status, None is 0.
    """
    accept_all_text((sys.stdout, sys.stderr))
    for name in _OF_LAUNCHERS:
        if not os.environ.get(name, name).strip():  # empty, as a script or a container leaves it: not set
            del os.environ[name]
    _name_user()
    try:
        return action() or 0
    except KeyboardInterrupt:
        print_lines(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (InputError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if os.environ.get("RANK", "0").strip() != "0":
            # As a rule rank 0 has the same error and prints it, and the launcher ends this rank in the meantime.
            time.sleep(_RANK_0_SPEAKS_FIRST)
        if getattr(error, "told_by_another", False):
            return INPUT_ERROR
        print(f"{prog}: error: {one_line(error)}{_way_out(error)}", file=sys.stderr)
        return INPUT_ERROR


def _name_user() -> None:
    """Gives the user a name for this process where there is none, as in a container that runs under any number:
    PyTorch asks for it when parts of it are imported, and fails without.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # the first up to Python 3.12, the second since
        os.environ["LOGNAME"] = f"uid{os.getuid()}"


def _way_out(error: Exception) -> str:
    """Returns what helps against errors whose own message does not say it."""
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):  # of tempfile
        return "; set TMPDIR to a folder that can be written"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "; free some space, or, where `df -i` shows that there are too many files, delete some"
    return ""


def print_lines(*lines: object, file: TextIO | None = None) -> None:
    """Prints lines, each as :func:`scf_fast.pipelines.text.printable` writes it, to standard output or ``file``."""
    print("\n".join(map(printable, lines)), file=file, flush=True)


class LineFormatter(logging.Formatter):
    """Formats a log record with its message in one printable line: no name in it can look like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def log_to_terminal() -> None:
    """Sends log lines of a command to standard error, unless its caller has said where they go."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def split_commas(text: str) -> list[str]:
    """Returns the parts of an argument like "a,b", without blanks around them and without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_paths(text: StrPath) -> tuple[str, ...]:
    """Returns the paths, at least one, in an argument like "a,b"; an existing path may hold a comma."""
    text = os.fspath(text)
    return (text,) if os.path.exists(text) else tuple(split_commas(text)) or (text,)
