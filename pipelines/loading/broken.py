"""What becomes of images that cannot be read or decoded."""

import logging
import threading

import numpy as np

from scf_fast.pipelines.errors import InputError

_LOG = logging.getLogger(__name__)
_LONGEST_RUN = 100  # so many broken images in a row are no accident: the data is gone or of another kind


class BrokenImages:
    """Replaces images that cannot be read or decoded, or lets their error through.

    The rule: a broken image is replaced, label and all, by the next image of the source that is not broken (after the
    last comes the first). So the replacement depends neither on the batch nor on the number of ranks, and face data
    sets being sorted by identity, it mostly shows the same person.

    Args:
        source: ImageSource; what its `broken` lists is replaced without a try.
        replace: False raises the error.
        log: whether to name each broken image, once, as a warning.

    Attributes:
        replaces: bool, as given.
        found: dict of position -> message, the images that turned out to be broken.
        replaced: int, how many replacements the loader has delivered.
    """

    def __init__(self, source, replace, log=True):
        self._source, self.replaces, self._log = source, replace, log
        self._known = set(source.broken.tolist()) if replace else set()
        self._lock = threading.Lock()
        self.found, self.replaced = {}, 0

    def __len__(self):
        """How many images are known to be broken."""
        return len(self._known)

    def known(self, indices):
        """Which images are known to be broken.

        Args:
            indices: (B,) int64.
        Returns:
            (B,) bool.
        """
        if not self._known:
            return np.zeros(len(indices), dtype=bool)
        return np.array([i in self._known for i in indices.tolist()], dtype=bool)

    def load(self, i, load):
        """The image to use for i.

        Args:
            i: int, position in the source.
            load: load(j) gives image j, or raises ValueError where that is broken.
        Returns:
            (j, load(j)).
        Raises:
            ValueError: image i is broken and is not to be replaced, or nothing that follows it can be loaded either.
        """
        if not self.replaces:
            return i, load(i)
        for step in range(min(_LONGEST_RUN, len(self._source))):
            j = (i + step) % len(self._source)
            if j not in self._known:
                try:
                    image = load(j)
                except ValueError as error:
                    self.add({j: str(error)})
                    continue
                return j, image
        raise InputError(
            f"{self._source.name(i)} and the {step} images after it cannot be read or decoded: "
            f"{self.found.get(j, 'as recorded before')}; "
            "check that the data is still there"
        )

    def add(self, found):
        """Note broken images.

        Args:
            found: dict of position -> message.
        """
        with self._lock:
            for i, message in found.items():
                if i not in self.found:
                    self._known.add(i)
                    self.found[i] = message
                    if self._log:
                        _LOG.warning(
                            "broken image, the next one takes its place: %s (%d so far)", message, len(self.found)
                        )
