"""Random access to encoded images and their labels, whatever they are stored in."""

import abc
import bisect
import contextlib
import os
import stat

import numpy as np

from scf_fast.pipelines.errors import InputError

LARGEST_FILE = (
    1 << 25
)  # bytes of an image file; a larger one is refused, so that a made-up file of terabytes costs no memory
LARGE_FILE = 1 << 20  # bytes; of these a batch is not read into memory together
_NO_BYTES = np.empty(0, dtype=np.uint8)


class ImageSource(abc.ABC):
    """N encoded images. Must be cheap to pickle: worker processes receive a copy.

    Attributes:
        labels: (N,) int64, the class of each image; -1 where it has none.
        num_classes: int, labels lie below it; 0 where no image has a class.
        broken: (K,) int64, images known to be undecodable, ascending.
    """

    labels: np.ndarray
    num_classes: int
    broken: np.ndarray = np.empty(0, dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    @abc.abstractmethod
    def encoded(self, i):
        """The image file i as a (bytes,) uint8 array; read-only where it is a view of stored bytes.

        Raises:
            ValueError: it cannot be read; the message names it.
        """

    def read(self, indices):
        """Many image files at once, for those who look at all of them anyway.

        Args:
            indices: (B,) int64.
        Returns:
            data: (bytes,) uint8.
            starts, lengths: (B,) int64; data[starts[b]:starts[b] + lengths[b]] is encoded(indices[b]). A length of 0
            says that encoded() has to be asked: it gives the image, which may be a LARGE_FILE, or the reason why there
            is none.
        """
        files = []
        for i in indices.tolist():
            file = _NO_BYTES
            with contextlib.suppress(ValueError):
                file = self.encoded(i)
            files.append(file if len(file) <= LARGE_FILE else _NO_BYTES)
        lengths = np.array([len(file) for file in files], dtype=np.int64)
        return np.concatenate([_NO_BYTES, *files]), np.cumsum(lengths) - lengths, lengths

    def check(self, i):  # noqa: B027 -- most formats keep no checksums
        """Compare image i with the checksum stored beside it, where its format keeps one.

        Raises:
            ValueError: they differ, or it cannot be read; the message names it.
        """

    @abc.abstractmethod
    def name(self, i):
        """What to call image i in a message, e.g. 'train.rec record 123'."""

    def will_need(self, indices):  # noqa: B027 -- a request that may come to nothing
        """Ask the system to have images in its page cache soon; returns at once, and does nothing where that cannot be
        asked.

        Args:
            indices: (B,) int64, best in ascending order: the disk is read in the order given.
        """

    def _set_labels(self, labels, count):
        """Fill `labels` and `num_classes`; None gives every image the label -1."""
        self.labels = np.full(count, -1, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels.shape != (count,):
            raise InputError(f"labels must be ({count},), one for each image, got {self.labels.shape}")
        self.num_classes = int(self.labels.max(initial=-1)) + 1


class EncodedImages(ImageSource):
    """Images in memory.

    Args:
        images: sequence of bytes-like.
        labels: (N,) integers, or None where the images have no class.
    """

    def __init__(self, images, labels=None):
        self._images = list(images)
        self._set_labels(labels, len(self._images))

    def encoded(self, i):
        return np.frombuffer(self._images[i], dtype=np.uint8)

    def name(self, i):
        return f"image {i}"


class ImageFiles(ImageSource):
    """One image a file.

    Args:
        paths: sequence of str or Path; read when asked for.
        labels: (N,) integers, or None where the images have no class.
    """

    def __init__(self, paths, labels=None):
        self._paths = [os.fspath(path) for path in paths]
        self._set_labels(labels, len(self._paths))

    def encoded(self, i):
        return read_image_file(self._paths[i])

    def name(self, i):
        return self._paths[i]


class SelectedImages(ImageSource):
    """Some images of a source, in any order, with or without the labels they have there.

    Args:
        source: ImageSource.
        indices: (M,) int64, positions in the source.
        with_labels: False gives every image the label -1.
    """

    def __init__(self, source, indices, with_labels=True):
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)
        self._set_labels(source.labels[self._indices] if with_labels else None, len(self._indices))
        self.num_classes = source.num_classes if with_labels else 0
        self.broken = np.flatnonzero(np.isin(self._indices, source.broken))

    def encoded(self, i):
        return self._source.encoded(int(self._indices[i]))

    def read(self, indices):
        return self._source.read(self._indices[indices])

    def check(self, i):
        self._source.check(int(self._indices[i]))

    def name(self, i):
        return self._source.name(int(self._indices[i]))

    def will_need(self, indices):
        self._source.will_need(self._indices[indices])


class ConcatenatedSources(ImageSource):
    """Several data sets as one, each with its own identities: the labels of each set start where those of the set
    before it end.

    Args:
        sources: sequence of ImageSource.

    Attributes:
        sizes: tuple of int, images in each source; image i of source k is image sum(sizes[:k]) + i.
    """

    def __init__(self, sources):
        self._sources = list(sources)
        self.sizes = tuple(len(source) for source in self._sources)
        self._starts = [0, *np.cumsum(self.sizes).tolist()]
        first_label = np.cumsum([0, *(source.num_classes for source in self._sources)])
        self.labels = np.concatenate(
            [
                np.where(source.labels < 0, -1, source.labels + first)
                for source, first in zip(self._sources, first_label)
            ]
        )
        self.num_classes = int(first_label[-1])
        self.broken = np.concatenate([source.broken + start for source, start in zip(self._sources, self._starts)])

    def encoded(self, i):
        source, i = self._find(i)
        return source.encoded(i)

    def read(self, indices):
        place = np.searchsorted(self._starts, indices, side="right") - 1
        starts, lengths, parts, end = (
            np.zeros(len(indices), dtype=np.int64),
            np.zeros(len(indices), dtype=np.int64),
            [_NO_BYTES],
            0,
        )
        for number in np.unique(place).tolist():
            here = place == number
            data, starts[here], lengths[here] = self._sources[number].read(indices[here] - self._starts[number])
            starts[here] += end
            parts.append(data)
            end += len(data)
        return np.concatenate(parts), starts, lengths

    def check(self, i):
        source, i = self._find(i)
        source.check(i)

    def name(self, i):
        source, i = self._find(i)
        return source.name(i)

    def will_need(self, indices):
        for source, start, end in zip(self._sources, self._starts, self._starts[1:]):
            source.will_need(indices[(indices >= start) & (indices < end)] - start)

    def _find(self, i):
        place = bisect.bisect_right(self._starts, i) - 1
        return self._sources[place], i - self._starts[place]


def read_image_file(path):
    """(bytes,) uint8, the whole file.

    Raises:
        ValueError: it cannot be read, is no regular file, or has more than LARGEST_FILE bytes.
    """
    name = os.fsdecode(path)
    if "\0" in name:
        raise InputError(f"cannot read image {name!r}: there is no such name; correct it or leave it out")
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe would wait for its writer forever
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_FILE:
                what = f"it has {about.st_size} bytes" if stat.S_ISREG(about.st_mode) else "it is none"
                raise InputError(
                    f"image {name} must be a regular file of at most {LARGEST_FILE} bytes and {what}; replace it or "
                    "leave it out"
                )
            return np.frombuffer(os.read(descriptor, about.st_size), dtype=np.uint8)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"cannot read image {name}: {os.strerror(error.errno)}; restore it or leave it out") from error


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".gif")
