"""Sources that find images by an index, made once by a scan of the data, kept beside it, mapped by every process."""

import abc
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from scf_fast.pipelines.aliases import Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.array_file import Array, map_arrays, write_arrays
from scf_fast.pipelines.formats.recordio import read_num_classes
from scf_fast.pipelines.sources.base import ImageSource, reason_of
from scf_fast.pipelines.sources.image_names import list_skipped
from scf_fast.pipelines.text import printable

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of the arrays in an index; one with another number is made again
LARGEST_LABEL = (1 << 31) - 1

Arrays = dict[str, Array]  # of an index, by name; `labels` and `broken` among them
Source = TypeVar("Source", bound="IndexedImages")


class Scan(NamedTuple):
    """What a scan of the data has found."""

    arrays: Arrays  # for the index, with `labels`
    skipped: dict[str, int]  # entries of the data that are no image, by reason


class IndexedImages(ImageSource):
    """Base of the sources with an index; made by their ``open``.

    The index is a few arrays, mapped into memory: forked workers share it, and a pickled copy opens it again. It is
    valid as long as the fingerprint of the data (sizes, dates, first bytes) is the one that it was made with. Beside
    the scan's result it holds the images that ``python -m scf_fast.pipelines.index DATA --verify`` could not decode.

    Attributes:
        skipped: entries of the data that are no image, by reason.
        verified: whether every image has been decoded once.
    """

    FORMAT: str  # the name of the format in messages
    RULES = (
        0  # counts the changes in what of the data is an image, which an index of an earlier version does not follow
    )

    def __init__(self, path: StrPath, index_path: StrPath, root: StrPath | None = None):
        self._path, self._index_path, self._root = Path(path), Path(index_path), root
        self._property = self._property_of(self._path)
        self._meta, self._arrays = map_arrays(index_path, check=False)  # checked by open
        self.labels, self.broken = self._arrays["labels"], self._arrays["broken"]
        self.skipped: dict[str, int] = self._meta["skipped"]
        self.verified: bool = self._meta["verified"]
        self._largest_label: int = self._meta["largest_label"]
        self.num_classes = self._largest_label + 1 if self._property is None else read_num_classes(self._property)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path, self._index_path, self._root)

    @classmethod
    def open(cls: type[Source], path: StrPath, cache_dir: StrPath | None = None, root: StrPath | None = None) -> Source:
        """Opens the source at ``path``; scans it, under a progress bar, where there is no valid index.

        Args:
            path: see the class.
            cache_dir: folder for the index; by default it lies beside the data, or where that is read-only in
                $XDG_CACHE_HOME/scf_fast (~/.cache/scf_fast).
            root: folder that relative paths in an image list start from; by default that of the list.
        Raises:
            InputError: the data is missing, damaged or holds no image, or a label does not fit.
        """
        path = Path(path)
        places = cls._index_places(path, cache_dir)
        index_path = next((place for place in places if cls._is_current(place, path)), None)
        source = cls(path, cls._build(path, places) if index_path is None else index_path, root)
        if source._largest_label >= source.num_classes:
            raise InputError(
                f"{source.name(int(source.labels.argmax()))} has label {source._largest_label}, but {source._property} "
                f"says {source.num_classes} classes; correct the property file, or take both files from the same data "
                "set"
            )
        return source

    def record_broken(self, broken: npt.ArrayLike) -> None:
        """Notes in the index which images cannot be decoded, after all have been tried; for sources opened from now on.

        Args:
            broken: positions in this source.
        """
        broken = np.unique(np.asarray(broken, dtype=np.int64))
        write_arrays(self._index_path, {**self._meta, "verified": True}, {**self._arrays, "broken": broken})

    def remarks(self) -> list[str]:
        """Returns what there is to say about the index, as lines of a report."""
        if self._meta.get("rules", 0) == self.RULES:
            return []
        return [
            "index                  of an earlier version, which chose the images in another way; runs that began with "
            f"it go on with it, for a new one delete {self._index_path}"
        ]

    @classmethod
    def _is_current(cls, index_path: Path, path: Path) -> bool:
        """Tells whether there is an index that can be used and is of the data as it is now."""
        index = cls._load(index_path)
        if index is None:
            cls._fingerprint(path, None)  # raises where there is no data
            return False
        meta, arrays = index
        return meta["fingerprint"] == cls._fingerprint(path, arrays)

    @classmethod
    def _load(cls, index_path: Path) -> tuple[dict[str, Any], Arrays] | None:
        """Returns (meta, arrays) of an index; None where there is none that can be used."""
        try:
            meta, arrays = map_arrays(index_path)
            if (meta["version"], meta["format"]) != (_VERSION, cls.FORMAT):
                return None  # of another release, or of another kind of data that had the name before
            if not cls._is_sound(meta, arrays):
                raise InputError(f"{index_path} contradicts itself; delete it")
            return meta, arrays
        except FileNotFoundError:
            pass
        except (KeyError, TypeError, AttributeError) as error:
            _LOG.warning("making the index again: %s is not one: %s", index_path, error)
        except (OSError, InputError) as error:
            _LOG.warning("making the index again: %s", error)
        return None

    @classmethod
    def _is_sound(cls, meta: dict[str, Any], arrays: Arrays) -> bool:
        """Tells whether the rest of the program may rely on an index, which is as untrusted as the data it came with;
        KeyError, TypeError or AttributeError where it lacks something.
        """
        labels, broken = arrays["labels"], arrays["broken"]
        return (
            type(meta["largest_label"]) is int
            and labels.dtype == broken.dtype == np.int64
            and labels.ndim == broken.ndim == 1
            and len(labels) > 0
            and 0 <= labels.min()
            and labels.max() == meta["largest_label"] <= LARGEST_LABEL
            and (not len(broken) or (0 <= broken[0] and broken[-1] < len(labels) and bool((np.diff(broken) > 0).all())))
            and isinstance(meta["fingerprint"], str)
            and isinstance(meta["verified"], bool)
            and all(type(count) is int for count in meta["skipped"].values())
        )

    @classmethod
    def _build(cls, path: Path, places: list[Path]) -> Path:
        """Scans the data and writes its index into the first of the places that can be written to; returns its path."""
        began = time.monotonic()
        with tqdm(
            total=cls._scan_size(path),
            desc=f"indexing {printable(path.name)}",
            unit="B",
            unit_scale=True,
            delay=2,
            disable=None,
        ) as bar:
            try:
                arrays, skipped = cls._scan(path, bar.update)
            except OSError as error:
                raise InputError(
                    f"cannot read {error.filename or path}: {reason_of(error)}; check that the data is still there"
                ) from error
        labels = arrays["labels"]
        if not len(labels):
            raise InputError(f"{path}: it holds no image; check that it is the right one{list_skipped(skipped)}")
        arrays = {**arrays, "labels": labels.astype(np.int64), "broken": np.empty(0, dtype=np.int64)}
        meta = {
            "version": _VERSION,
            "format": cls.FORMAT,
            "fingerprint": cls._fingerprint(path, arrays),
            "skipped": skipped,
            "verified": False,
            "largest_label": int(labels.max()),
            "rules": cls.RULES,
        }
        index_path = next((place for place in places[:-1] if os.access(place.parent, os.W_OK)), places[-1])
        if index_path != places[0]:
            _LOG.info("%s is read-only: the index of %s goes to %s", places[0].parent, path.name, index_path.parent)
        try:
            write_arrays(index_path, meta, arrays)
        except OSError as error:
            raise InputError(
                f"cannot write the index {index_path}: {reason_of(error)}; make room there, or give another folder for "
                "indexes"
            ) from error
        _LOG.info(
            "%s: %d images in %s, indexed in %.1f s%s",
            path,
            len(labels),
            cls.FORMAT,
            time.monotonic() - began,
            list_skipped(skipped),
        )
        return index_path

    @classmethod
    def _index_places(cls, path: Path, cache_dir: StrPath | None) -> list[Path]:
        """Returns the paths at which the index may lie, the best first."""
        beside = cls._beside(path)
        # One folder for each of the many files called train.rec.
        folder = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
        if cache_dir is not None:
            return [Path(cache_dir) / folder / beside.name]
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # a user without a name has no home, as in a container that runs under any number
            return [beside]
        return [beside, cache / "scf_fast" / folder / beside.name]

    @classmethod
    def _property_of(cls, path: Path) -> Path | None:
        """Returns the file that says how many classes the data has."""
        return None

    @classmethod
    def _beside(cls, path: Path) -> Path:
        """Returns the path of the index beside the data."""
        return path.with_name(f"{path.name}.index")

    @classmethod
    @abc.abstractmethod
    def _fingerprint(cls, path: Path, arrays: Arrays | None) -> str | None:
        """Returns a text that changes with the data. ``arrays`` are those of the index, None where there is none.

        Raises:
            InputError: there is no data.
        """

    @classmethod
    @abc.abstractmethod
    def _scan_size(cls, path: Path) -> int | None:
        """Returns the total of the progress that the scan reports; None where it is not known beforehand."""

    @classmethod
    @abc.abstractmethod
    def _scan(cls, path: Path, progress: Progress) -> Scan:
        """Goes through all the data."""


def check_labels(labels: npt.NDArray[Any], name: Callable[[int], str], largest: int = LARGEST_LABEL) -> None:
    """Refuses labels that are no class numbers.

    Args:
        labels: (N,) numbers.
        name: name(i) is what messages call image i.
        largest: the largest label allowed.
    Raises:
        InputError: one is no whole number in 0..largest.
    """
    is_class = (labels == np.floor(labels)) & (labels >= 0) & (labels <= largest)
    if not is_class.all():
        first = int(np.argmin(is_class))
        raise InputError(f"{name(first)} has label {labels[first]:g}; a label must be a whole number in 0..{largest}")
