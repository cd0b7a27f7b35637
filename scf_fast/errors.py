"""Errors that end a command with one line."""

from scf_fast.pipelines.errors import InputError

__all__ = ["Incomplete", "InputError"]


class Incomplete(RuntimeError):
    """Training is over, but something it should leave behind could not be written."""
