"""A folder of image files, one subfolder for each identity."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scf_fast.pipelines.aliases import ByteArray, Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import IMAGE_SUFFIXES, read_image_file, reason_of
from scf_fast.pipelines.sources.digest import fingerprint_of_folders
from scf_fast.pipelines.sources.indexed import Arrays, IndexedImages, Scan, check_labels

_SUFFIXES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
_OUTSIDE, _EMPTY = "images outside the folders of identities", "empty images"


class FolderIndex(IndexedImages):
    """The images below a folder; made by ``FolderIndex.open(path)``.

    The first folder on the way to an image is its identity, deeper ones do not matter. Identities are numbered in the
    order of their names' bytes; where ``path`` holds a ``property`` file, the names are the numbers themselves. Files
    are images by their suffix; images in ``path`` itself, which belong to nobody, and empty ones are skipped and
    counted. Hidden files and folders are ignored. An identity may be a link to a folder elsewhere; deeper links to
    folders are not followed. The index notices added, removed and renamed files; it lies beside ``path``.
    """

    FORMAT = "image folder"

    def encoded(self, i: int) -> ByteArray:
        return read_image_file(self._file(i))

    def name(self, i: int) -> str:
        return os.fsdecode(self._file(i))

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
        skipped = {_OUTSIDE: 0, _EMPTY: 0}
        folders, files, labels = [b""], [], []
        try:
            with os.scandir(os.fsencode(path)) as entries:
                top = sorted(entries, key=lambda entry: entry.name)
            identities = [entry.name for entry in top if entry.is_dir() and not entry.name.startswith(b".")]
            skipped[_OUTSIDE] = sum(_is_image(entry) for entry in top)
            are_numbered = (path / "property").exists()
            for position, identity in enumerate(identities):
                if are_numbered and not identity.isdigit():
                    raise InputError(
                        f"{path} holds a property file, so its folders must be named by class numbers, "
                        f"but one is {os.fsdecode(identity)!r}; rename the folder, or delete the property file"
                    )
                for folder, names in _walk(os.fsencode(path), identity):
                    folders.append(folder)
                    for name, is_empty in names:
                        skipped[_EMPTY] += is_empty
                        if not is_empty:
                            files.append(folder + b"/" + name)
                            labels.append(int(identity) if are_numbered else position)
                            progress(1)
        except OSError as error:
            raise InputError(
                f"cannot list {os.fsdecode(error.filename or path)}: {reason_of(error)}; restore it or leave it out"
            ) from error
        label_array = np.array(labels, dtype=np.int64)
        check_labels(label_array, lambda i: os.fsdecode(files[i]))
        return Scan({"labels": label_array, **_pack("files", files), **_pack("folders", folders)}, skipped)

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


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in _SUFFIXES and not entry.name.startswith(b".") and entry.is_file()


def _walk(root: bytes, folder: bytes) -> Iterator[tuple[bytes, list[tuple[bytes, bool]]]]:
    """Yields (folder, [(image name, is it empty)]) for a folder and those below it, in the order of their names; paths
    are relative to ``root``.
    """
    with os.scandir(os.path.join(root, folder)) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    yield folder, [(entry.name, entry.stat().st_size == 0) for entry in entries if _is_image(entry)]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(b"."):
            yield from _walk(root, folder + b"/" + entry.name)


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
