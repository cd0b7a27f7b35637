"""Errors that end a command with one line."""

from scf_fast.pipelines.errors import InputError, UnreadableError

__all__ = ["Incomplete", "InputError", "UnreadableError"]


class Incomplete(RuntimeError):
    """Training is over, but something it should leave behind could not be written."""
