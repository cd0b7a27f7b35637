"""Random access to the images of a data set and their labels, however they are stored."""

import abc
import bisect
import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scf_fast.pipelines.aliases import ByteArray, IntArray, StrPath
from scf_fast.pipelines.errors import InputError, UnreadableError

LARGEST_FILE = (
    1 << 25
)  # bytes of an image file; a larger one is refused, so a made-up file of terabytes costs no memory
LARGE_FILE = 1 << 20  # bytes; larger files are not read together with others of a batch
_NO_BYTES: ByteArray = np.empty(0, dtype=np.uint8)


class ReadFiles(NamedTuple):
    """Image files that were read together."""

    data: ByteArray  # (bytes,)
    starts: IntArray  # (B,) file b is data[starts[b]:starts[b] + lengths[b]]
    lengths: IntArray  # (B,) 0 where the image has to be asked for on its own


class ImageSource(abc.ABC):
    """Base of the data sets: N images with labels. Must be cheap to pickle, because worker processes receive a copy.

    Attributes:
        labels: (N,), the class of each image; -1 where it has none.
        num_classes: labels lie below it; 0 where no image has a class.
        broken: (K,), images known to be undecodable, ascending.
    """

    labels: IntArray
    num_classes: int
    broken: IntArray = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images in each of the data sets that this source consists of."""
        return (len(self),)

    @abc.abstractmethod
    def encoded(self, i: int) -> ByteArray:
        """Returns image file i, (bytes,); read-only where it is a view of stored bytes.

        Raises:
            InputError: it cannot be read; the message names it.
        """

    def pixels(self, i: int) -> ByteArray | None:
        """Returns face i, (112, 112, 3) RGB, where the source makes it itself; None where ``encoded(i)`` is to be
        decoded.

        Raises:
            InputError: it cannot be read or decoded; the message names it.
        """
        return None

    def read(self, indices: IntArray) -> ReadFiles:
        """Reads many image files at once.

        A length of 0 tells the caller to ask for the image on its own, by pixels() and encoded(): it is a LARGE_FILE,
        the source makes its pixels, or it cannot be read and encoded() says why.
        """
        files = []
        for i in indices.tolist():
            file = _NO_BYTES
            with contextlib.suppress(InputError):
                file = self.encoded(i)
            files.append(file if len(file) <= LARGE_FILE else _NO_BYTES)
        lengths = np.array([len(file) for file in files], dtype=np.int64)
        return ReadFiles(np.concatenate([_NO_BYTES, *files]), np.cumsum(lengths) - lengths, lengths)

    def check(self, i: int) -> None:  # noqa: B027 -- most formats keep no checksums
        """Compares image i with the checksum stored beside it, where its format keeps one.

        Raises:
            InputError: they differ, or it cannot be read; the message names it.
        """

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Returns the name of image i in messages, e.g. 'train.rec record 123'."""

    def will_need(self, indices: IntArray) -> None:  # noqa: B027 -- a request that may come to nothing
        """Asks the system to bring images into its page cache; returns at once, and does nothing where that cannot be
        asked.

        Args:
            indices: (B,), best in ascending order: the disk is read in the order given.
        """

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Feeds a hash with what decides the pixels of all images: their files' bytes, or what stands for these."""
        for i in range(len(self)):
            digest.update(self.encoded(i).data)

    def _set_labels(self, labels: npt.ArrayLike | None, count: int) -> None:
        """Sets ``labels`` and ``num_classes``; None gives every image the label -1."""
        self.labels = np.full(count, -1, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels.shape != (count,):
            raise ValueError(f"labels must be ({count},), one for each image, got {self.labels.shape}")
        self.num_classes = int(self.labels.max(initial=-1)) + 1


class EncodedImages(ImageSource):
    """Image files in memory.

    Args:
        images: the files.
        labels: (N,) integers, or None where the images have no class.
    """

    def __init__(self, images: Iterable[bytes | ByteArray], labels: npt.ArrayLike | None = None):
        self._images = list(images)
        self._set_labels(labels, len(self._images))

    def encoded(self, i: int) -> ByteArray:
        return np.frombuffer(self._images[i], dtype=np.uint8)

    def name(self, i: int) -> str:
        return f"image {i}"


class ImageFiles(ImageSource):
    """Image files on disk, read when asked for.

    Args:
        paths: the files.
        labels: (N,) integers, or None where the images have no class.
    """

    def __init__(self, paths: Iterable[StrPath], labels: npt.ArrayLike | None = None):
        self._paths = [os.fspath(path) for path in paths]
        self._set_labels(labels, len(self._paths))

    def encoded(self, i: int) -> ByteArray:
        return read_image_file(self._paths[i])

    def name(self, i: int) -> str:
        return self._paths[i]

    def update_digest(self, digest: "hashlib._Hash") -> None:
        for path in self._paths:
            status = os.stat(path)
            name = "/".join(Path(path).parts[-2:])  # of a picture and its identity; the data set may move
            digest.update(os.fsencode(name) + f" {status.st_size} {status.st_mtime_ns}\n".encode())


class SelectedImages(ImageSource):
    """Some images of a source, in any order, with or without their labels.

    Args:
        source: where they are from.
        indices: (M,), positions in the source.
        with_labels: False gives every image the label -1.
    """

    def __init__(self, source: ImageSource, indices: npt.ArrayLike, with_labels: bool = True):
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self._set_labels(source.labels[self._indices] if with_labels else None, len(self._indices))
        self.num_classes = source.num_classes if with_labels else 0
        self.broken = np.flatnonzero(np.isin(self._indices, source.broken))

    def encoded(self, i: int) -> ByteArray:
        return self._source.encoded(int(self._indices[i]))

    def pixels(self, i: int) -> ByteArray | None:
        return self._source.pixels(int(self._indices[i]))

    def read(self, indices: IntArray) -> ReadFiles:
        return self._source.read(self._indices[indices])

    def check(self, i: int) -> None:
        self._source.check(int(self._indices[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._indices[i]))

    def will_need(self, indices: IntArray) -> None:
        self._source.will_need(self._indices[indices])


class ConcatenatedSources(ImageSource):
    """Several data sets as one, each with its own identities: the labels of each set start where those of the set
    before it end. Image i of source k is image sum(sizes[:k]) + i.
    """

    def __init__(self, sources: Sequence[ImageSource]):
        self._sources = list(sources)
        self._starts = [0, *np.cumsum([len(source) for source in self._sources]).tolist()]
        first_label = np.cumsum([0, *(source.num_classes for source in self._sources)])
        self.labels = np.concatenate(
            [
                np.where(source.labels < 0, -1, source.labels + first)
                for source, first in zip(self._sources, first_label)
            ]
        )
        self.num_classes = int(first_label[-1])
        self.broken = np.concatenate([source.broken + start for source, start in zip(self._sources, self._starts)])

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(source) for source in self._sources)

    def encoded(self, i: int) -> ByteArray:
        source, i = self._find(i)
        return source.encoded(i)

    def pixels(self, i: int) -> ByteArray | None:
        source, i = self._find(i)
        return source.pixels(i)

    def read(self, indices: IntArray) -> ReadFiles:
        place = np.searchsorted(self._starts, indices, side="right") - 1
        starts, lengths = np.zeros(len(indices), dtype=np.int64), np.zeros(len(indices), dtype=np.int64)
        parts, end = [_NO_BYTES], 0
        for number in np.unique(place).tolist():
            here = place == number
            data, starts[here], lengths[here] = self._sources[number].read(indices[here] - self._starts[number])
            starts[here] += end
            parts.append(data)
            end += len(data)
        return ReadFiles(np.concatenate(parts), starts, lengths)

    def check(self, i: int) -> None:
        source, i = self._find(i)
        source.check(i)

    def name(self, i: int) -> str:
        source, i = self._find(i)
        return source.name(i)

    def will_need(self, indices: IntArray) -> None:
        for source, start, end in zip(self._sources, self._starts, self._starts[1:]):
            source.will_need(indices[(indices >= start) & (indices < end)] - start)

    def _find(self, i: int) -> tuple[ImageSource, int]:
        place = bisect.bisect_right(self._starts, i) - 1
        return self._sources[place], i - self._starts[place]


def read_image_file(path: str | bytes) -> ByteArray:
    """Reads a whole image file, (bytes,).

    Raises:
        UnreadableError: it cannot be read.
        InputError: it is no regular file, or has more than LARGEST_FILE bytes.
    """
    name = os.fsdecode(path)
    if "\0" in name:
        raise InputError(f"cannot read image {name!r}: no file can have that name; correct it or leave it out")
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"image {name} must be a regular file, and is none; replace it or leave it out")
            if about.st_size > LARGEST_FILE:
                raise InputError(
                    f"image {name} must have at most {LARGEST_FILE} bytes and has {about.st_size}; replace it or leave "
                    "it out"
                )
            return np.frombuffer(os.read(descriptor, about.st_size), dtype=np.uint8)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableError(f"cannot read image {name}: {reason_of(error)}; restore it or leave it out") from error


def reason_of(error: OSError) -> str:
    """Returns the system's words for an error, without the file's name."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{os.strerror(error.errno)} (`ulimit -n` raises the limit)"
    return os.strerror(error.errno) if error.errno is not None else str(error)


def spread_evenly(count: int, at_most: int) -> list[int]:
    """Returns up to ``at_most`` different positions below ``count``, from the first to the last, evenly spread."""
    return np.linspace(0, count - 1, num=min(at_most, count), dtype=np.int64).tolist()
