import argparse
import dataclasses
import difflib
import types
import typing
from pathlib import Path

import yaml

from scf_fast.config import Config, PerStage
from scf_fast.errors import InputError


def _value_type(field):
    """(python type, is a tuple) of a field's annotation, seen through ``| None``."""
    annotation = typing.get_type_hints(Config)[field.name]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _coerce(field, value, source):
    """``value`` of a recipe or a flag as the field's type; a clear error otherwise."""
    kind, is_tuple = _value_type(field)
    try:
        if value is None:
            return None
        if is_tuple:
            parts = value.replace(" ", "").split(",") if isinstance(value, str) else value
            return tuple(kind(part) for part in parts if part != "")
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise ValueError
        if kind is int:
            number = (
                int(value) if str(value).strip().lstrip("+-").isdigit() else float(value)
            )  # 1e5 is whole, and a long seed no float
            if int(number) != number:
                raise ValueError
            return int(number)
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        expected = f"comma-separated {kind.__name__}s" if is_tuple else {bool: "true or false"}.get(kind, kind.__name__)
        raise InputError(f"{source}: {field.name} must be {expected}, got {value!r}") from None


def _suggest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Switch(argparse.Action):
    """--x for true, --no_x (as the published command line spells it) or --no-x for false."""

    def __init__(self, option_strings, dest, **extra):
        super().__init__(option_strings, dest, nargs=0, **extra)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith(("--no_", "--no-")))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line, generated from :class:`Config`."""
    parser = _Parser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        description="Train a Sphere Confidence Face model: stage 'backbone' (margin softmax), then stage 'confidence' "
        "(kappa on the frozen backbone).",
        epilog="Launch with `deepspeed train.py ...`, `torchrun ... train.py ...` or plain `python train.py ...`.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML recipe with any of the flags below as keys; flags on the command line win",
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # appended by the deepspeed launcher
    titles = {
        "task": "what to do",
        "model": "model and loss",
        "training": "optimization",
        "input": "input pipeline",
        "system": "system",
        "published": "the published command line",
    }
    groups = {key: parser.add_argument_group(title) for key, title in titles.items()}
    for field in dataclasses.fields(Config):
        meta = field.metadata
        default = field.default
        shown = default
        if isinstance(default, PerStage):
            shown = ", ".join(f"{value} ({stage})" for stage, value in vars(default).items() if value is not None)
        text = meta["help"] + ("" if shown in (None, ()) else f" [{shown}]")
        if meta["stage"]:
            text = f"({meta['stage']} only) {text}"
        flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        kind, _ = _value_type(field)
        if kind is bool:
            flags |= dict.fromkeys([f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"])
        extra = (
            {"action": _Switch}
            if kind is bool
            else {
                "metavar": meta["metavar"]
                or ("{" + ",".join(map(str, meta["choices"])) + "}" if meta["choices"] else kind.__name__.upper())
            }
        )
        groups[meta["group"]].add_argument(
            *flags, dest=field.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **extra
        )
    return parser


def load_recipe(path: str) -> dict:
    """Keys and values of a YAML recipe; unknown keys are refused.

    Raises:
        ValueError: the file is missing, is no YAML mapping, or has an unknown key or a value of the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(
            f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML recipe"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: is no valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: must hold `key: value` lines, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key in values:
        if key not in fields:
            raise InputError(f"--config {path}: unknown key {key!r}{_suggest(str(key), fields)}")
    return {key: _coerce(fields[key], value, f"--config {path}") for key, value in values.items()}


def parse(arguments: list[str] | None = None) -> Config:
    """The run's configuration from the command line; wrong input ends the process with one line and exit status 2."""
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    flags = {name for action in parser._actions for name in action.option_strings}
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{_suggest(unknown[0].split('=')[0], flags)}")
    try:
        values: dict = {}
        for path in known.config:
            values.update(load_recipe(path))
        fields = {field.name: field for field in dataclasses.fields(Config)}
        given = {name: value for name, value in vars(known).items() if name in fields}
        values.update({name: _coerce(fields[name], value, f"--{name}") for name, value in given.items()})
        config = Config(**values)
        for name in values:
            only = fields[name].metadata["stage"]
            if only and only != config.stage and values[name] is not None:
                raise InputError(f"--{name} belongs to stage {only}, but this is stage {config.stage}; leave it out")
        return config
    except ValueError as error:
        parser.error(str(error))
