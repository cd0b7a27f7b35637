"""What a run reads, known by its content: between a run and its resume, data and weights may move.

``inputs.json`` in a run's folder has the path and digests of each. Folders of the first versions have no such file; a
run goes on from them where the paths are the same, as it did then.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scf_fast.command import split_paths
from scf_fast.config import Config
from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import write_json
from scf_fast.pipelines.formats.text_file import read_text
from scf_fast.pipelines.sources.base import ImageSource, spread_evenly
from scf_fast.pipelines.sources.digest import labels_digest, sampled_images_digest
from scf_fast.weights.reading import files_of

log = logging.getLogger(__name__)

FILE = "inputs.json"
_IMAGES = 64  # whose bytes stand for all
_BLOCKS, _BLOCK_BYTES = 64, 4096  # of a weight file, spread evenly
_DIGITS = 16
_WEIGHTS = ("saved_bkb", "saved_fc")
_LABELS, _CONTENT = "labels", "content"  # what a digest is of
Noted = dict[str, dict[str, str]]  # by option: path, and digests


def is_same_path(before: str | None, now: str | None) -> bool:
    """Returns whether an option names the same paths, however they are spelled."""
    if before and now:
        return [os.path.realpath(path) for path in split_paths(before)] == [
            os.path.realpath(path) for path in split_paths(now)
        ]
    return before == now


def digests_of_data(source: ImageSource) -> dict[str, str]:
    """Returns the digest of all labels, and that of the bytes of some images, spread evenly."""
    return {
        _LABELS: labels_digest(source)[:_DIGITS],
        _CONTENT: sampled_images_digest(source, _IMAGES)[:_DIGITS],
    }


def note(config: Config, source: ImageSource) -> None:
    """Writes the file of a run, where it does not say the same already; on one rank.

    Raises:
        OSError: it could not be written.
    """
    path, inputs = Path(config.output_dir, FILE), dict(_inputs(config, source))
    if noted(path.parent) != inputs:
        write_json(path, inputs, indent=2, end="\n")


def noted(folder: Path) -> Noted:
    """Returns what a run's folder says of its inputs; nothing where it has no such file, or another's."""
    try:
        found: Any = json.loads(read_text(folder / FILE))
        return {
            name: {key: str(value) for key, value in entry.items()} for name, entry in found.items() if "path" in entry
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def check(config: Config, source: ImageSource) -> None:
    """Checks that a run that goes on reads what it began with, wherever that lies now; says so where it has moved.

    Raises:
        InputError: data or weights at another path are others, or the labels are, wherever the data lie.
    """
    before = noted(Path(config.output_dir))
    for name, now in _inputs(config, source) if before else ():
        old = before.get(name)
        if old is None:
            continue
        different = [key for key, value in now.items() if key != "path" and old.get(key, value) != value]
        if not is_same_path(old["path"], now["path"]):
            if different:
                raise InputError(
                    f"--output_dir {config.output_dir}: holds a different run ({name} {old['path']!r} -> "
                    f"{now['path']!r}, which has {_others(name, different)}); give another folder, or --overwrite to "
                    "delete it"
                )
            what = "the same images and identities" if name == "data" else "the same weights"
            log.info("--%s has moved from %s to %s: %s, so the run goes on", name, old["path"], now["path"], what)
        elif _LABELS in different:
            raise InputError(
                f"--data {config.data}: the images have other labels than when the run in {config.output_dir} began, "
                "as after a folder was renamed or a list sorted; give the data of that run, or another --output_dir"
            )
        elif different:
            log.warning("--%s %s: is not what it was when the run began, it has been changed since", name, now["path"])


def is_data_of(folder: Path, source: ImageSource) -> bool:
    """Returns whether a run in a folder was trained on these images, by their digests."""
    data = noted(folder).get("data")
    return data is not None and all(data.get(key) == value for key, value in digests_of_data(source).items())


def _others(name: str, different: list[str]) -> str:
    if name != "data":
        return "other weights"
    return "other identities" if _LABELS in different else "other images"


def _inputs(config: Config, source: ImageSource) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (option, path and digests) of everything that decides the run."""
    yield "data", {"path": config.data, **digests_of_data(source)}
    for name in _WEIGHTS:
        spec = getattr(config, name, None)
        if spec:
            yield name, {"path": spec, _CONTENT: _digest_of_files(files_of(spec, f"--{name}"))}


def _digest_of_files(paths: list[str]) -> str:
    """Returns the digest of sizes and of some bytes of files, wherever they lie."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode())
            for block in spread_evenly(-(-size // _BLOCK_BYTES), _BLOCKS):
                file.seek(block * _BLOCK_BYTES)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:_DIGITS]
