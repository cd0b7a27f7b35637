"""Description of an option, for the command line, recipes and the run folder."""

import dataclasses
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
