"""A folder of image files, one subfolder an identity."""

import hashlib
import os
from pathlib import Path

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import IMAGE_SUFFIXES, read_image_file
from scf_fast.pipelines.sources.indexed import IndexedImages, check_labels


class FolderIndex(IndexedImages):
    """The images below a folder; made by `FolderIndex.open(path)`.

    The first folder on the way to an image is its identity, deeper ones do not matter. Identities are numbered in the
    order of their names' bytes; where `path` holds a `property` file, the names are the numbers themselves. Files are
    images by their suffix; images in `path` itself, which belong to nobody, and empty ones are skipped and counted,
    hidden files and folders not looked at. An identity may be a link to a folder elsewhere; deeper links to folders are
    not followed. The index notices added, removed and renamed files; it lies beside `path`.
    """

    FORMAT = "image folder"

    def encoded(self, i):
        return read_image_file(self._file(i))

    def name(self, i):
        return os.fsdecode(self._file(i))

    def class_name(self, label):
        """The name of an identity's folder; None where no image has the label."""
        image = int(np.argmax(self.labels == label))
        return os.fsdecode(_name(self._arrays, "files", image).split(b"/")[0]) if self.labels[image] == label else None

    def _file(self, i):
        return os.path.join(os.fsencode(self._path), _name(self._arrays, "files", i))

    @classmethod
    def _property_of(cls, path):
        return path / "property" if (path / "property").exists() else None

    @classmethod
    def _scan_size(cls, path):
        return None

    @classmethod
    def _scan(cls, path, progress):
        skipped = {"images outside the folders of identities": 0, "empty images": 0}
        folders, files, labels = [b""], [], []
        try:
            with os.scandir(os.fsencode(path)) as entries:
                top = sorted(entries, key=lambda entry: entry.name)
            identities = [entry.name for entry in top if entry.is_dir() and not entry.name.startswith(b".")]
            skipped["images outside the folders of identities"] = sum(_is_image(entry) for entry in top)
            numbered = (path / "property").exists()
            for position, identity in enumerate(identities):
                if numbered and not identity.isdigit():
                    raise InputError(
                        f"{path} holds a property file, so its folders must be named by class numbers, "
                        f"but one is {os.fsdecode(identity)!r}; rename the folder, or delete the property file"
                    )
                for folder, names in _walk(os.fsencode(path), identity):
                    folders.append(folder)
                    for name, is_empty in names:
                        skipped["empty images"] += is_empty
                        if not is_empty:
                            files.append(folder + b"/" + name)
                            labels.append(int(identity) if numbered else position)
                            progress(1)
        except OSError as error:
            raise InputError(
                f"cannot list {os.fsdecode(error.filename)}: {os.strerror(error.errno)}; restore it or leave it out"
            ) from error
        labels = np.array(labels, dtype=np.int64)
        check_labels(labels, lambda i: os.fsdecode(files[i]))
        return {"labels": labels, **_pack("files", files), **_pack("folders", folders)}, skipped

    @classmethod
    def _is_sound(cls, meta, arrays):
        return super()._is_sound(meta, arrays) and (
            _are_names(arrays, "files")
            and _are_names(arrays, "folders")
            and len(arrays["files_ends"]) == len(arrays["labels"])
        )

    @classmethod
    def _fingerprint(cls, path, arrays):
        """Digest of the dates of all folders: one changes with every file that comes or goes."""
        if not path.is_dir():
            raise InputError(f"{path} must be a folder; check the path")
        if arrays is None or "folders" not in arrays:
            return None
        digest = hashlib.sha256(str((path / "property").exists()).encode())
        for i in range(len(arrays["folders_ends"])):
            try:
                digest.update(
                    f"{os.stat(os.path.join(os.fsencode(path), _name(arrays, 'folders', i))).st_mtime_ns} ".encode()
                )
            except OSError:
                digest.update(b"gone ")
        return digest.hexdigest()


def _is_image(entry):
    return os.path.splitext(entry.name)[1].lower() in _SUFFIXES and not entry.name.startswith(b".") and entry.is_file()


def _walk(root, folder):
    """(folder, [(image name, is it empty)]) of a folder and those below it, in the order of their names; paths relative
    to `root`.
    """
    with os.scandir(os.path.join(root, folder)) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    yield folder, [(entry.name, entry.stat().st_size == 0) for entry in entries if _is_image(entry)]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(b"."):
            yield from _walk(root, folder + b"/" + entry.name)


def _pack(key, names):
    """Arrays that hold names, which _name finds again."""
    return {
        key: np.frombuffer(b"".join(names), dtype=np.uint8),
        f"{key}_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }


def _are_names(arrays, key):
    """Whether these are arrays that _pack made."""
    names, ends = arrays[key], arrays[f"{key}_ends"]
    return (
        names.dtype == np.uint8
        and ends.dtype == np.int64
        and names.ndim == ends.ndim == 1
        and (not len(ends) or (ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] <= len(names)))
    )


def _name(arrays, key, i):
    ends = arrays[f"{key}_ends"]
    return arrays[key][int(ends[i - 1]) if i else 0 : int(ends[i])].tobytes()


_SUFFIXES = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)


def image_path(folder, label, position, suffix):
    """Where an image of a class lies in a folder that holds a `property` file."""
    return Path(folder) / f"{label:07d}" / f"{position:09d}{suffix}"
