"""The one rule for which files below a folder are its images; training, evaluation and embedding go by it.

    a file is an image by its suffix, if it is a regular file (or a link to one) and not empty
    hidden files and folders are skipped: .DS_Store, ._0.jpg of macOS, .ipynb_checkpoints
    folders that a system or a program makes for itself are skipped: __MACOSX of zip, @eaDir of Synology, ...
    a folder may be a link at the first level, where identities are; deeper links to folders are not followed

What is skipped is counted by reason.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_JPEG_SUFFIXES, _PNM_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif"), (".ppm", ".pgm", ".pnm", ".pbm", ".pfm")
IMAGE_SUFFIXES = (*_JPEG_SUFFIXES, ".png", ".webp", ".bmp", *_PNM_SUFFIXES, ".tif", ".tiff", ".gif")
# Images that nothing here reads: they are named by their suffix where they are counted.
_UNREAD_SUFFIXES = frozenset(
    f".{suffix}" for suffix in "heic heif avif jxl jp2 j2k dng cr2 cr3 nef arw psd svg exr tga".split()
)
_KNOWN = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)
# Compared without regard to case.
_SYSTEM_FOLDERS = frozenset(
    (b"__macosx", b"@eadir", b"@recycle", b"#recycle", b"#snapshot", b"$recycle.bin", b"lost+found")
    + (b"system volume information",)
)
SYSTEM_FOLDERS_REASON = "folders of a system or a program (__MACOSX, @eaDir, lost+found, ...)"
HIDDEN_REASON = "hidden files and folders"
EMPTY_REASON = "empty images"
OTHERS_REASON = "files without the suffix of an image"
_LINKS_REASON = "links to folders below the first level"
_SPECIAL_REASON = "images that are no regular files, or links that lead nowhere"


def is_hidden(name: str | bytes) -> bool:
    """Tells whether a file or folder of this name is hidden."""
    return name[:1] in (".", b".")


def visible(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths whose last name is not hidden, sorted: what a glob has found, without ``._`` files of macOS."""
    return sorted(path for path in paths if not is_hidden(path.name))


def is_system_folder(name: bytes) -> bool:
    """Tells whether a folder of this name is one that a system or a program has made for itself."""
    return name.lower() in _SYSTEM_FOLDERS


def list_skipped(skipped: Mapping[str, int]) -> str:
    """Returns what was skipped as messages end with it: "; skipped 3 hidden files and folders; skipped ..."."""
    return "".join(f"; skipped {count} {reason}" for reason, count in skipped.items() if count)


def unread_reason(suffix: str) -> str | None:
    """Returns the reason why an image with this suffix (".heic") is skipped; None where it is none of those kinds."""
    suffix = suffix.lower()
    return f"{suffix} images, which are not read here; convert them" if suffix in _UNREAD_SUFFIXES else None


def subfolders(root: bytes, skipped: Counter[str]) -> tuple[list[bytes], list[bytes]]:
    """Lists the first level of a folder.

    Args:
        skipped: gets what is left out, by reason.
    Returns:
        The names of its folders, and of its images, each in the order of their bytes.
    """
    with os.scandir(root) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if _is_folder(entry, skipped, links=True)]
    return folders, list(_images_among(entries, skipped))


def walk_images(root: bytes, folder: bytes, skipped: Counter[str]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yields (folder, names of its images) for a folder and those below it, in the order of their names' bytes.

    Args:
        root: folder that ``folder`` and the folders yielded are relative to.
        skipped: gets what is left out, by reason.
    """
    with os.scandir(os.path.join(root, folder)) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    yield folder, list(_images_among(entries, skipped))
    for entry in entries:
        if _is_folder(entry, skipped, links=False):
            yield from walk_images(root, os.path.join(folder, entry.name), skipped)


def _is_folder(entry: os.DirEntry[bytes], skipped: Counter[str], links: bool) -> bool:
    if not entry.is_dir():
        return False
    if is_hidden(entry.name):
        reason = HIDDEN_REASON
    elif is_system_folder(entry.name):
        reason = SYSTEM_FOLDERS_REASON
    elif entry.is_symlink() and not links:
        reason = _LINKS_REASON
    else:
        return True
    skipped[reason] += 1
    return False


def _images_among(entries: Iterable[os.DirEntry[bytes]], skipped: Counter[str]) -> Iterator[bytes]:
    for entry in entries:
        if entry.is_dir():
            continue
        reason = _reason_to_skip(entry)
        if reason is None:
            yield entry.name
        else:
            skipped[reason] += 1


def _reason_to_skip(entry: os.DirEntry[bytes]) -> str | None:
    if is_hidden(entry.name):
        return HIDDEN_REASON
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in _KNOWN:
        return unread_reason(suffix.decode("latin1")) or OTHERS_REASON
    if not entry.is_file():
        return _SPECIAL_REASON
    return None if entry.stat().st_size else EMPTY_REASON
