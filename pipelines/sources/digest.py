"""Digests of data: by them an index, an unfinished conversion, a feature cache and stored embeddings know their data.

All values are kept in files, so none of them may change.
"""

import codecs
import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from scf_fast.pipelines.aliases import StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import ImageSource, reason_of, spread_evenly

_PRINTED_FILES = 64  # files of one data set whose first bytes count: of the thousandth shard, size and date are enough
_PRINTED_BYTES = 4096  # of each


def sampled_digest(source: ImageSource, images: int) -> str:
    """Returns the digest of a source's labels and of up to ``images`` of its image files, evenly spread."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).data)
    _update_with_images(digest, source, images)
    return digest.hexdigest()


def labels_digest(source: ImageSource) -> str:
    """Returns the digest of a source's labels."""
    return hashlib.sha256(np.ascontiguousarray(source.labels).data).hexdigest()


def sampled_images_digest(source: ImageSource, images: int) -> str:
    """Returns the digest of up to ``images`` of a source's image files, evenly spread."""
    digest = hashlib.sha256()
    _update_with_images(digest, source, images)
    return digest.hexdigest()


def _update_with_images(digest: "hashlib._Hash", source: ImageSource, images: int) -> None:
    for i in spread_evenly(len(source), images):
        try:
            digest.update(source.encoded(i).data)
        except InputError:  # training replaces it, and names it
            digest.update(b"unreadable")


def content_digest(source: ImageSource, settings: str) -> str:
    """Returns the digest of everything that decides the pixels of a source, followed by a text of settings."""
    digest = hashlib.sha256()
    source.update_digest(digest)
    digest.update(settings.encode())
    return digest.hexdigest()


def fingerprint_of_files(files: Sequence[StrPath]) -> str:
    """Returns the digest of the files' names, sizes, dates, and first bytes.

    Raises:
        InputError: one cannot be read.
    """
    digest = hashlib.sha256()
    printed = set(spread_evenly(len(files), _PRINTED_FILES))
    for number, name in enumerate(files):
        try:
            status = os.stat(name)
            digest.update(os.fsencode(os.path.basename(name)) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
            if number in printed:
                with open(name, "rb") as file:
                    digest.update(file.read(_PRINTED_BYTES))
        except OSError as error:
            raise InputError(f"cannot open {name}: {reason_of(error)}; check the path") from error
    return digest.hexdigest()


def fingerprint_of_text(path: StrPath) -> str:
    """Returns the digest of a text file; another one than :func:`fingerprint_of_files` where it starts with the mark of
    UTF-8, which the first versions took for the beginning of its first name.
    """
    fingerprint = fingerprint_of_files([path])
    with open(path, "rb") as file:
        marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return f"{fingerprint} after its mark" if marked else fingerprint


def fingerprint_of_folders(folders: Iterable[bytes], are_numbered: bool) -> str:
    """Returns the digest of the dates of folders, one of which changes with every file that comes or goes; and of
    whether they are named by class numbers.
    """
    digest = hashlib.sha256(str(are_numbered).encode())
    for folder in folders:
        try:
            digest.update(f"{os.stat(folder).st_mtime_ns} ".encode())
        except OSError:
            digest.update(b"gone ")
    return digest.hexdigest()
