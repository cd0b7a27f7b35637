"""Random access to encoded images and their labels, whatever they are stored in."""
import abc
import os

import numpy as np


class ImageSource(abc.ABC):
    """N encoded images. Must be cheap to pickle: worker processes receive a copy.

    Attributes:
        labels: (N,) int64, the class of each image; -1 where it has none.
        num_classes: int, labels lie below it; 0 where no image has a class.
    """

    labels: np.ndarray
    num_classes: int

    def __len__(self):
        return len(self.labels)

    @abc.abstractmethod
    def encoded(self, i):
        """The image file i as a (bytes,) uint8 array; read-only, a view of the stored bytes where that is possible."""

    @abc.abstractmethod
    def name(self, i):
        """What to call image i in a message, e.g. 'train.rec record 123'."""

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
        try:
            return np.fromfile(self._paths[i], dtype=np.uint8)
        except OSError as error:
            raise ValueError(f"cannot read image {self._paths[i]}: {os.strerror(error.errno)}; restore it or leave it out") from error

    def name(self, i):
        return self._paths[i]
