"""The command line and the recipes, generated from the options in :mod:`scf_fast.config`."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from scf_fast.command import Parser, split_commas
from scf_fast.config import STAGES, ConfidenceConfig, Config, FeatureConfig, PerStage, option_of, value_type
from scf_fast.config.yaml_file import YAMLError, read_yaml
from scf_fast.errors import InputError
from scf_fast.pipelines.formats import file_kinds
from scf_fast.pipelines.formats.file_kinds import Wanted, refusal
from scf_fast.pipelines.text import shown

_STAGE_HELP = "which stage to train; implied to be 'confidence' by --saved_bkb"
_GROUPS = {
    "task": "what to do",
    "model": "model and loss",
    "training": "optimization",
    "input": "input pipeline",
    "system": "system",
    "published": "the published command line",
}
_IN_WORDS: dict[type, str] = {bool: "true or false", str: "text, several names in it with commas between"}
SomeConfig = TypeVar("SomeConfig", bound=Config)


@dataclasses.dataclass(frozen=True)
class _Flag:
    """An option as the command line sees it.

    Attributes:
        kind: Python type of a value, or of an element of a tuple.
        is_tuple: whether several values are given, with commas between.
        stage: the only stage that has the option; None where both have it.
    """

    field: dataclasses.Field
    kind: type
    is_tuple: bool
    stage: str | None

    @property
    def name(self) -> str:
        return self.field.name


def _all_flags() -> dict[str, _Flag]:
    """Returns every option of any stage by name."""
    flags: dict[str, _Flag] = {}
    for config_class in STAGES.values():
        annotations = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            having = [stage for stage, other in STAGES.items() if field.name in other.__dataclass_fields__]
            only = having[0] if len(having) == 1 else None
            flags.setdefault(field.name, _Flag(field, *value_type(annotations[field.name]), only))
    return flags


def _coerce(flag: _Flag, value: Any, source: str) -> Any:
    """Returns the value of a recipe or a flag as the option's type.

    Args:
        source: where the value is from, for the message.
    Raises:
        InputError: it is no such value.
    """
    kind = flag.kind
    try:
        if value is None:
            return None
        if flag.is_tuple:
            parts = split_commas(value) if isinstance(value, str) else value
            if not isinstance(parts, list):
                raise ValueError
            return tuple(_coerce_one(kind, part) for part in parts if part != "")
        return _coerce_one(kind, value)
    except (TypeError, ValueError, OverflowError):
        expected = f"comma-separated {kind.__name__}s" if flag.is_tuple else _IN_WORDS.get(kind, kind.__name__)
        raise InputError(f"{source}: {flag.name} must be {expected}, got {shown(value)}") from None


def _coerce_one(kind: type, value: Any) -> Any:
    """Returns a single value as a type; TypeError, ValueError or OverflowError if it is none: true is no number, and a
    list no path.
    """
    if isinstance(value, bool) != (kind is bool) or isinstance(value, list | dict | set | tuple | bytes):
        raise ValueError
    if kind is int:
        # 1e5 is a whole number, and a long seed is no float
        number = int(value) if str(value).strip().lstrip("+-").isdigit() else float(value)
        if int(number) != number:
            raise ValueError
        return int(number)
    return kind(value)


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _Switch(argparse.Action):
    """``--x`` for true, ``--no_x`` (as the published command line spells it) for false."""

    def __init__(self, option_strings, dest, **extra):
        super().__init__(option_strings, dest, nargs=0, **extra)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


def _add_flag(group: argparse._ArgumentGroup, flag: _Flag) -> None:
    option = option_of(flag.field)
    default = shown = flag.field.default
    if isinstance(default, PerStage):
        shown = ", ".join(f"{value} ({stage})" for stage, value in vars(default).items() if value is not None)
    elif isinstance(default, tuple):
        shown = ",".join(map(str, default))
    text = option.help + ("" if shown in (None, "") else f" [{shown}]")
    if flag.stage:
        text = f"({flag.stage} only) {text}"
    settings: dict[str, Any] = {"dest": flag.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if flag.kind is bool:
        group.add_argument(f"--{flag.name}", f"--no_{flag.name}", action=_Switch, **settings)
    else:
        choices = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else ""
        group.add_argument(
            f"--{flag.name}", metavar=option.metavar or choices or flag.kind.__name__.upper(), **settings
        )


def build_parser() -> Parser:
    """Returns the parser of the training command, generated from the configuration classes."""
    parser = Parser(
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
    # The deepspeed launcher appends it.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    groups = {key: parser.add_argument_group(title) for key, title in _GROUPS.items()}
    groups["task"].add_argument(
        "--stage", metavar="{" + ",".join(STAGES) + "}", default=argparse.SUPPRESS, help=_STAGE_HELP
    )
    for flag in _all_flags().values():
        _add_flag(groups[option_of(flag.field).group], flag)
    return parser


def load_recipe(path: str) -> dict[str, Any]:
    """Returns keys and values of a YAML recipe, each of its option's type.

    Raises:
        InputError: the file is missing, is no YAML mapping, or has an unknown key or a value of the wrong type.
    """
    try:
        values = read_yaml(path, Wanted.RECIPE)
    except OSError as error:
        raise InputError(
            f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML recipe"
        ) from None
    except InputError as error:
        raise InputError(f"--config {error}") from None
    except (YAMLError, ValueError) as error:
        what = refusal(path, Wanted.RECIPE, file_kinds.YAML) or f"is no valid YAML ({_where(error)})"
        raise InputError(f"--config {path}: {what}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        what = refusal(path, Wanted.RECIPE, file_kinds.YAML) or f"must hold `key: value` lines, got {found}"
        raise InputError(f"--config {path}: {what}")
    flags = _all_flags()
    for key in values:
        if key != "stage" and key not in flags:
            raise InputError(f"--config {path}: unknown key {shown(key)}{_suggest(str(key), ['stage', *flags])}")
    return {
        key: value if key == "stage" else _coerce(flags[key], value, f"--config {path}")
        for key, value in values.items()
    }


def _where(error: Exception) -> str:
    """Returns where a YAML file ends to be one, and why."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}"


def make_config(values: dict[str, Any]) -> Config:
    """Returns the configuration of the stage that ``values`` name, or that ``saved_bkb`` among them implies.

    Args:
        values: by option, ``stage`` among them.
    Raises:
        InputError: there is no such stage, a value cannot be used, or it belongs to another stage.
    """
    values = dict(values)
    stage = values.pop("stage", None)
    if stage is None and values.get("saved_bkb"):
        stage = "confidence"
    if not isinstance(stage, str) or stage not in STAGES:
        raise InputError(f"--stage must be one of {', '.join(STAGES)}, got {shown(stage)}")
    return make_config_of(STAGES[stage], values)


def make_config_of(config_class: type[SomeConfig], values: dict[str, Any]) -> SomeConfig:
    """Returns a configuration of the class.

    Raises:
        InputError: a value cannot be used, or belongs to another stage.
    """
    flags = _all_flags()
    own = {field.name for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if name not in own and value is not None:
            raise InputError(
                f"--{name} belongs to stage {flags[name].stage}, but this is stage {config_class.stage}; leave it out"
            )
    # nothing, as a recipe may have it, is the default
    return config_class(**{name: value for name, value in values.items() if name in own and value is not None})


def parse_values(arguments: list[str] | None = None) -> dict[str, Any]:
    """Returns the options that a command line and its recipes give, each of its type.

    Raises:
        InputError: an unknown flag, or a value of the wrong type.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    flags = _all_flags()
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        raise InputError(f"unknown argument {unknown[0]}{_suggest(f'--{name}', (f'--{flag}' for flag in flags))}")
    values: dict[str, Any] = {}
    for path in known.config:
        values.update(load_recipe(path))
    given = vars(known)
    if "stage" in given:
        values["stage"] = given["stage"]
    values.update({name: _coerce(flag, given[name], f"--{name}") for name, flag in flags.items() if name in given})
    return values


def parse_feature_pass(arguments: list[str], output_dir: Path, **fixed: Any) -> FeatureConfig:
    """Returns the configuration of a pass that computes features and trains nothing, from flags of train.py.

    Options of stage 2 that only training heeds are accepted and have no effect, so that its recipes can be given.

    Args:
        output_dir: if the flags give none.
        fixed: options that the flags cannot change.
    Raises:
        InputError: an unknown flag, a value that cannot be used, or an option of stage 1.
    """
    values = {"output_dir": str(output_dir), "batch_size": 256, **parse_values(arguments)}
    training = {field.name for field in dataclasses.fields(ConfidenceConfig)} - {
        field.name for field in dataclasses.fields(FeatureConfig)
    }
    kept = {name: value for name, value in values.items() if name != "stage" and name not in training}
    return make_config_of(FeatureConfig, {**kept, **fixed})


def parse(arguments: list[str] | None = None) -> Config:
    """Returns the run's configuration.

    Raises:
        InputError: it cannot be used.
    """
    return make_config(parse_values(arguments))
