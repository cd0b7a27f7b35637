"""Description of an option, for the command line, recipes and the run folder."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PerStage:
    """A default that depends on the stage."""

    backbone: Any
    confidence: Any


@dataclass(frozen=True)
class Option:
    """Description of an option for the command line and the run folder, besides its type and default.

    Attributes:
        identity: whether another value makes it another run, which --resume refuses.
        reads: whether its value names files that a run reads and does not make.
    """

    help: str
    choices: tuple | None = None
    group: str = "training"
    metavar: str | None = None
    identity: bool = False
    reads: bool = False


def option(default: Any, help: str, **settings) -> Any:
    """Returns the dataclass field of an option; ``settings`` are those of :class:`Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **settings)})


def option_of(field: dataclasses.Field) -> Option:
    """Returns what :func:`option` was told about a field."""
    return field.metadata["option"]


def value_type(annotation: Any) -> tuple[Any, bool]:
    """Returns (Python type, whether it is a tuple of them) of a field, seen through ``| None``."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False
