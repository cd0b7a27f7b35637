"""A folder of image files, one subfolder for each identity."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import read_image_file, reason_of
from scf_fast.pipelines.sources.digest import fingerprint_of_folders
from scf_fast.pipelines.sources.image_names import is_system_folder, subfolders, walk_images
from scf_fast.pipelines.sources.indexed import Arrays, IndexedImages, Scan, check_labels
from scf_fast.pipelines.text import shown_names

_LOG = logging.getLogger(__name__)
_OUTSIDE = "images outside the folders of identities"
_WITHOUT = "folders without an image, whose class numbers stay unused"
_STRANGE = "which a system or a program made for itself"
_NAMED = 8  # folders that a line of the report names


class FolderIndex(IndexedImages):
    """The images below a folder; made by ``FolderIndex.open(path)``.

    The first folder on the way to an image is its identity, deeper ones do not matter. Which files and folders count is
    the rule of :mod:`scf_fast.pipelines.sources.image_names`; images in ``path`` itself, which belong to nobody, are
    skipped too. Identities are numbered in the order of their names' bytes; where ``path`` holds a ``property`` file,
    the names are the numbers themselves. A folder keeps its number while it holds no image: the numbers of all others,
    which trained class centers go by, do not change with the files that come and go in it. The index notices added,
    removed and renamed files; it lies beside ``path``.
    """

    FORMAT = "image folder"
    RULES = 1

    def encoded(self, i: int) -> ByteArray:
        return read_image_file(self._file(i))

    def name(self, i: int) -> str:
        return os.fsdecode(self._file(i))

    def remarks(self) -> list[str]:
        folders = [_name(self._arrays, "folders", i) for i in range(len(self._arrays["folders_ends"]))]
        identities = [name for name in folders if name and b"/" not in name]
        used = set(np.unique(self.labels).tolist())
        without = [
            name
            for position, name in enumerate(identities)
            if (position if self._property is None else int(name)) not in used
        ]
        lines = [f"without an image       {_shown(without)}"] if without else []
        strange = self._system_folders()
        if strange:
            lines.append(f"counted as images      those in {_shown(strange)}, {_STRANGE}")
        return [*super().remarks(), *lines]

    def _system_folders(self) -> list[bytes]:
        """Returns the names of folders that an index of an earlier version counts and the rule leaves out."""
        if self._meta.get("rules", 0) == self.RULES:
            return []
        folders = (_name(self._arrays, "folders", i) for i in range(len(self._arrays["folders_ends"])))
        return sorted({part for name in folders for part in name.split(b"/") if is_system_folder(part)})

    @classmethod
    def open(cls, path: StrPath, cache_dir: StrPath | None = None, root: StrPath | None = None) -> "FolderIndex":
        source = super().open(path, cache_dir, root)
        strange = source._system_folders()
        if strange:
            _LOG.warning(
                "%s: its index is of an earlier version and counts the images in %s, %s; for a new run delete %s",
                path,
                _shown(strange),
                _STRANGE,
                source._index_path,
            )
        return source

    def _file(self, i: int) -> bytes:
        return os.path.join(os.fsencode(self._path), _name(self._arrays, "files", i))

    @classmethod
    def _property_of(cls, path: Path) -> Path | None:
        return path / "property" if (path / "property").exists() else None

    @classmethod
    def _scan_size(cls, path: Path) -> None:
        return None

    @classmethod
    def _scan(cls, path: Path, progress: Progress) -> Scan:
        skipped = Counter[str]()
        folders = [b""]
        files: list[bytes] = []
        labels: list[int] = []
        root = os.fsencode(path)
        try:
            identities, outside = subfolders(root, skipped)
            skipped[_OUTSIDE] = len(outside)
            are_numbered = (path / "property").exists()
            for position, identity in enumerate(identities):
                if are_numbered and not identity.isdigit():
                    raise InputError(
                        f"{path} holds a property file, so its folders must be named by class numbers, "
                        f"but one is {os.fsdecode(identity)!r}; rename the folder, or delete the property file"
                    )
                before = len(files)
                for folder, names in walk_images(root, identity, skipped):
                    folders.append(folder)
                    files += [folder + b"/" + name for name in names]
                    labels += [int(identity) if are_numbered else position] * len(names)
                    progress(len(names))
                skipped[_WITHOUT] += len(files) == before
        except OSError as error:
            raise InputError(
                f"cannot list {os.fsdecode(error.filename or path)}: {reason_of(error)}; restore it or leave it out"
            ) from error
        label_array = np.array(labels, dtype=np.int64)
        check_labels(label_array, lambda i: os.fsdecode(files[i]))
        return Scan({"labels": label_array, **_pack("files", files), **_pack("folders", folders)}, dict(+skipped))

    @classmethod
    def _is_sound(cls, meta: dict[str, Any], arrays: Arrays) -> bool:
        return super()._is_sound(meta, arrays) and (
            _are_names(arrays, "files")
            and _are_names(arrays, "folders")
            and len(arrays["files_ends"]) == len(arrays["labels"])
        )

    @classmethod
    def _fingerprint(cls, path: Path, arrays: Arrays | None) -> str | None:
        if not path.is_dir():
            raise InputError(f"{path} must be a folder; check the path")
        if arrays is None or "folders" not in arrays:
            return None
        folders = (
            os.path.join(os.fsencode(path), _name(arrays, "folders", i)) for i in range(len(arrays["folders_ends"]))
        )
        return fingerprint_of_folders(folders, (path / "property").exists())


def image_path(folder: StrPath, label: int, position: int, suffix: str) -> Path:
    """Returns the path of an image of a class in a folder that holds a ``property`` file."""
    return Path(folder) / f"{label:07d}" / f"{position:09d}{suffix}"


def _shown(names: Sequence[bytes]) -> str:
    return shown_names([os.fsdecode(name) for name in names], _NAMED)


def _pack(key: str, names: Sequence[bytes]) -> Arrays:
    """Arrays that hold names, for :func:`_name` to find them again."""
    return {
        key: np.frombuffer(b"".join(names), dtype=np.uint8),
        f"{key}_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }


def _are_names(arrays: Arrays, key: str) -> bool:
    """Tells whether these are arrays as :func:`_pack` makes them."""
    names, ends = arrays[key], arrays[f"{key}_ends"]
    return bool(
        names.dtype == np.uint8
        and ends.dtype == np.int64
        and names.ndim == ends.ndim == 1
        and (not len(ends) or (ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] <= len(names)))
    )


def _name(arrays: Arrays, key: str, i: int) -> bytes:
    ends = arrays[f"{key}_ends"]
    return arrays[key][int(ends[i - 1]) if i else 0 : int(ends[i])].tobytes()
