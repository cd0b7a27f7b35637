"""What becomes of images that cannot be read or decoded."""

import enum
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from scf_fast.pipelines.errors import InputError, UnreadableError
from scf_fast.pipelines.sources.base import ImageSource

_LOG = logging.getLogger(__name__)
_LONGEST_RUN = 100  # a longer run of broken images is no accident: the data is gone or of another kind
_Image = TypeVar("_Image")


LEFT_OUT = -1  # in place of the position of an image that is left out


class OnBroken(enum.Enum):
    """What happens at an image that cannot be read or decoded."""

    RAISE = "raise"  # its error passes
    REPLACE = "replace"  # the next good image takes its place, label and all
    LEAVE_OUT = "leave_out"  # a black face takes its place, and LEFT_OUT that of its position and its label


_DONE = {OnBroken.REPLACE: "broken image, the next one takes its place", OnBroken.LEAVE_OUT: "image left out"}


class BrokenImages:
    """Replaces images that cannot be read or decoded, leaves them out, or lets their error through.

    A broken image is replaced, label and all, by the next image of the source that is not broken; the first follows the
    last. So the replacement depends neither on the batch nor on the number of ranks, and since face data sets are
    sorted by identity, it mostly shows the same person.

    Args:
        source: images that its ``broken`` lists are not tried, unless their error is to be raised.
        on_broken: what happens to them.
        log: whether to name each broken image, once, as a warning.

    Attributes:
        on_broken: as given.
        found: position -> message of the images that turned out to be broken.
        replaced: the number of images delivered by the loader in place of broken ones.
    """

    def __init__(self, source: ImageSource, on_broken: OnBroken, log: bool = True):
        self._source, self.on_broken, self._log = source, on_broken, log
        self._known: set[int] = set() if on_broken is OnBroken.RAISE else set(source.broken.tolist())
        self._lock = threading.Lock()
        self.found: dict[int, str] = {}
        self.replaced = 0
        self._unread = 0  # images in a row that could not be read

    def __len__(self) -> int:
        """Returns the number of images known to be broken."""
        return len(self._known)

    def known(self, indices: np.ndarray) -> np.ndarray:
        """Tells which of (B,) int64 images are known to be broken: (B,) bool."""
        if not self._known:
            return np.zeros(len(indices), dtype=bool)
        return np.array([i in self._known for i in indices.tolist()], dtype=bool)

    def load(self, i: int, load: Callable[[int], _Image], blank: _Image) -> tuple[int, _Image]:
        """Loads image i or its replacement.

        Args:
            i: position in the source.
            load: load(j) returns image j, or raises InputError where that is broken.
            blank: takes the place of an image that is left out.
        Returns:
            The position j of the image to use, and load(j); or LEFT_OUT and the blank.
        Raises:
            InputError: image i is broken and its error is to be raised, or nothing that follows it can be loaded
                either; of those to be left out, a hundred in a row could not even be read.
        """
        if self.on_broken is OnBroken.RAISE:
            return i, load(i)
        if self.on_broken is OnBroken.LEAVE_OUT:
            return self._load_or_leave_out(i, load, blank)
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

    def _load_or_leave_out(self, i: int, load: Callable[[int], _Image], blank: _Image) -> tuple[int, _Image]:
        if i in self._known:
            self.found.setdefault(i, f"{self._source.name(i)} is broken, as recorded before")
            return LEFT_OUT, blank
        try:
            image = load(i)
        except InputError as error:
            self._unread = self._unread + 1 if isinstance(error, UnreadableError) else 0
            if self._unread >= _LONGEST_RUN:
                raise
            self.add({i: str(error)})
            return LEFT_OUT, blank
        self._unread = 0
        return i, image

    def add(self, found: Mapping[int, str]) -> None:
        """Notes broken images, given as position -> message."""
        with self._lock:
            for i, message in found.items():
                if i not in self.found:
                    self._known.add(i)
                    self.found[i] = message
                    if self._log:
                        _LOG.warning(f"{_DONE[self.on_broken]}: %s (%d so far)", message, len(self.found))
