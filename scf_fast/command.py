"""The runner and the argument parser of every command."""

from scf_fast.pipelines.command import (
    INPUT_ERROR,
    INTERRUPTED,
    TRACEBACK_VARIABLE,
    LineFormatter,
    Parser,
    log_to_terminal,
    print_lines,
    run,
    split_commas,
    split_paths,
)

__all__ = [
    "INPUT_ERROR",
    "INTERRUPTED",
    "TRACEBACK_VARIABLE",
    "LineFormatter",
    "Parser",
    "log_to_terminal",
    "print_lines",
    "run",
    "split_commas",
    "split_paths",
]
