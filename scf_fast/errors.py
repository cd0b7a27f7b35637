"""Errors that a command shows as one line."""

from scf_fast.pipelines.errors import InputError

__all__ = ["InputError"]
