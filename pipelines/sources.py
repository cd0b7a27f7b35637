"""Random access to encoded images and their labels, whatever they are stored in."""
import abc
import bisect
import os

import numpy as np


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

    @abc.abstractmethod
    def name(self, i):
        """What to call image i in a message, e.g. 'train.rec record 123'."""

    def will_need(self, indices):  # noqa: B027 -- a request that may come to nothing
        """Ask the system to have images in its page cache soon; returns at once, and does nothing where that cannot be asked.

        Args:
            indices: (B,) int64, best in ascending order: the disk is read in the order given.
        """

    def _set_labels(self, labels, count):
        """Fill `labels` and `num_classes`; None gives every image the label -1."""
        self.labels = np.full(count, -1, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels.shape != (count,):
            raise ValueError(f"labels must be ({count},), one for each image, got {self.labels.shape}")
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

    def name(self, i):
        return self._source.name(int(self._indices[i]))

    def will_need(self, indices):
        self._source.will_need(self._indices[indices])


class ConcatenatedSources(ImageSource):
    """Several data sets as one, each with its own identities: the labels of each set start where those of the set before it end.

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
        self.labels = np.concatenate([np.where(source.labels < 0, -1, source.labels + first) for source, first in zip(self._sources, first_label)])
        self.num_classes = int(first_label[-1])
        self.broken = np.concatenate([source.broken + start for source, start in zip(self._sources, self._starts)])

    def encoded(self, i):
        source, i = self._find(i)
        return source.encoded(i)

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
        ValueError: it cannot be read.
    """
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"cannot read image {os.fsdecode(path)}: {os.strerror(error.errno)}; restore it or leave it out") from error
