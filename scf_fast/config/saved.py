"""The configuration in the run folder, with a checksum: a flipped digit must not hold other people out. Older versions
wrote none.
"""

import dataclasses
import json
import sys
import typing
import zlib
from pathlib import Path
from typing import Any

import yaml

from scf_fast.config.backbone import BackboneConfig
from scf_fast.config.base import Config
from scf_fast.config.confidence import ConfidenceConfig
from scf_fast.config.options import value_type
from scf_fast.config.yaml_file import YAMLError, read_yaml
from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import write_text

_CHECKSUM = "crc32"
STAGES: dict[str, type[Config]] = {"backbone": BackboneConfig, "confidence": ConfidenceConfig}


def save(config: Config, path: Path, versions: dict) -> None:
    """Writes the resolved configuration and versions as YAML, complete or not at all."""
    options = config.as_dict()
    content = {"config": options, "command": " ".join(sys.argv), "versions": versions, _CHECKSUM: _checksum(options)}
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def _checksum(options: Any) -> int:
    return zlib.crc32(json.dumps(options, sort_keys=True, default=str).encode(errors="surrogatepass"))


def load_saved(path: Path) -> dict[str, Any]:
    """Returns the ``config`` part of a file that :func:`save` wrote.

    Raises:
        InputError: it is no such file.
    """
    try:
        content = read_yaml(path)
        saved = content["config"]
        problem = _problem(saved)
        if problem is None and content.get(_CHECKSUM, _checksum(saved)) != _checksum(saved):
            problem = f"other options than were written: damaged, or, if you have changed it, delete its {_CHECKSUM}"
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as error:
        problem = type(error).__name__
    if problem is not None:
        raise InputError(
            f"{path}: is no saved configuration ({problem}); to go on with the "
            "checkpoints beside it, delete this file and give the same arguments with --resume; --overwrite starts over"
        )
    return saved


def _problem(saved: Any) -> str | None:
    """Returns what is wrong with the options of a run, in words; those that this version does not know may be
    anything.
    """
    if not isinstance(saved, dict):
        return "no options in it"
    if not isinstance(saved.get("data"), str):
        return "without data"
    if saved.get("stage") not in [None, *STAGES]:
        return "no such stage"
    for config_class in STAGES.values():
        annotations = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            (kind, is_tuple), value = value_type(annotations[field.name]), saved.get(field.name)
            if value is None:
                continue
            if isinstance(value, list) != is_tuple or not all(_is_a(kind, part) for part in _listed(value)):
                return f"{field.name} is of another type"
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_a(kind: type, value: Any) -> bool:
    """Tells whether a value is of an option's type; a whole number may stand for a float."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
