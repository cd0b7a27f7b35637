"""Replacement of images that cannot be read or decoded."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.sources.base import ImageSource

_LOG = logging.getLogger(__name__)
_LONGEST_RUN = 100  # a longer run of broken images is no accident: the data is gone or of another kind
_Image = TypeVar("_Image")


class BrokenImages:
    """Replaces images that cannot be read or decoded, or lets their error through.

    A broken image is replaced, label and all, by the next image of the source that is not broken; the first follows the
    last. So the replacement depends neither on the batch nor on the number of ranks, and since face data sets are
    sorted by identity, it mostly shows the same person.

    Args:
        source: images that its ``broken`` lists are replaced without a try.
        replace: False raises the error.
        log: whether to name each broken image, once, as a warning.

    Attributes:
        replaces: as given.
        found: position -> message of the images that turned out to be broken.
        replaced: the number of replacements that the loader has delivered.
    """

    def __init__(self, source: ImageSource, replace: bool, log: bool = True):
        self._source, self.replaces, self._log = source, replace, log
        self._known: set[int] = set(source.broken.tolist()) if replace else set()
        self._lock = threading.Lock()
        self.found: dict[int, str] = {}
        self.replaced = 0

    def __len__(self) -> int:
        """Returns the number of images known to be broken."""
        return len(self._known)

    def known(self, indices: np.ndarray) -> np.ndarray:
        """Tells which of (B,) int64 images are known to be broken: (B,) bool."""
        if not self._known:
            return np.zeros(len(indices), dtype=bool)
        return np.array([i in self._known for i in indices.tolist()], dtype=bool)

    def load(self, i: int, load: Callable[[int], _Image]) -> tuple[int, _Image]:
        """Loads image i or its replacement.

        Args:
            i: position in the source.
            load: load(j) returns image j, or raises InputError where that is broken.
        Returns:
            The position j of the image to use, and load(j).
        Raises:
            InputError: image i is broken and is not to be replaced, or nothing that follows it can be loaded either.
        """
        if not self.replaces:
            return i, load(i)
        for step in range(min(_LONGEST_RUN, len(self._source))):
            j = (i + step) % len(self._source)
            if j not in self._known:
                try:
                    image = load(j)
                except InputError as error:
                    self.add({j: str(error)})
                    continue
                return j, image
        raise InputError(
            f"{self._source.name(i)} and the {step} images after it cannot be read or decoded: "
            f"{self.found.get(j, 'as recorded before')}; check that the data is still there"
        )

    def add(self, found: Mapping[int, str]) -> None:
        """Notes broken images, given as position -> message."""
        with self._lock:
            for i, message in found.items():
                if i not in self.found:
                    self._known.add(i)
                    self.found[i] = message
                    if self._log:
                        _LOG.warning(
                            "broken image, the next one takes its place: %s (%d so far)", message, len(self.found)
                        )
