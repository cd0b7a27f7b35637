"""The configuration in the run folder."""

import sys
from pathlib import Path

import yaml

from scf_fast.config.base import Config
from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import write_text
from scf_fast.pipelines.formats.text_file import read_text


def save(config: Config, path: Path, versions: dict) -> None:
    """Writes the resolved configuration and versions as YAML, complete or not at all."""
    text = yaml.safe_dump(
        {"config": config.as_dict(), "command": " ".join(sys.argv), "versions": versions}, sort_keys=False
    )
    write_text(path, text)


def load_saved(path: Path) -> dict:
    """Returns the ``config`` part of a file that :func:`save` wrote.

    Raises:
        InputError: it is no such file.
    """
    try:
        return yaml.safe_load(read_text(path))["config"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: is no saved configuration ({type(error).__name__}); to go on with the "
            "checkpoints beside it, delete this file and give the same arguments with --resume; --overwrite starts over"
        ) from None
