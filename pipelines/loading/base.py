"""The loader of both backends: preprocessing, batches, and what they share of an iteration."""

import abc
import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading.augmentation import PRESETS, Augmentation
from scf_fast.pipelines.loading.broken import LEFT_OUT, BrokenImages
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, DaemonThreads

# Images of a rank that the disk is asked for together, 160 MB: 64 blocks of 256, which a block shuffle mixes.
_READ_AHEAD = 1 << 14
_CENTER = 127.5
_SCALE = {
    "insightface": 127.5,  # arcface_torch: mean 0.5, std 0.5 of values in [0, 1]
    "published": 128.0,  # the published SCF code: mean 0.5, std 0.5 * 256/255
}


@dataclass(frozen=True)
class Preprocessing:
    """The way from decoded pixels in 0..255 to the input of a network."""

    normalization: str = "insightface"  # (x - 127.5) / 127.5, or "published": (x - 127.5) / 128
    horizontal_flip: bool = True  # mirror each image with probability 1/2
    augmentation: Augmentation = PRESETS["none"]

    def __post_init__(self) -> None:
        if self.normalization not in _SCALE:
            raise InputError(f"normalization must be one of {', '.join(_SCALE)}, got {self.normalization!r}")

    def normalize(self, faces: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scales pixels. Each result is the exact quotient rounded once to dtype: x - 127.5 is exact in bf16 and wider.

        Args:
            faces: (B, H, W, 3) uint8.
            dtype: a floating-point type.
        Returns:
            (B, 3, H, W) in channels_last memory format; new memory.
        """
        images = faces.permute(0, 3, 1, 2).to(dtype, memory_format=torch.channels_last)
        return images.sub_(_CENTER).div_(_SCALE[self.normalization])


class Batch(NamedTuple):
    """One rank's share of a global batch."""

    images: torch.Tensor  # (B, 3, 112, 112) in the loader's dtype, channels_last, on its device
    labels: torch.Tensor  # (B,) int64 on the loader's device
    # (B,) int64 on the CPU, positions in the source of the images shown, so of the replacement of a broken image;
    # LEFT_OUT of one that is left out.
    indices: torch.Tensor


class Request(NamedTuple):
    """The images of one batch, as a backend is asked for them."""

    indices: np.ndarray  # (B,) int64, B > 0
    flips: np.ndarray  # (B,) bool


class Decoded(NamedTuple):
    """A backend's answer to a request."""

    # (B, 112, 112, 3): uint8, valid until the next one is asked for; or normalized, in the loader's dtype, and valid
    # for as long as it is kept.
    faces: torch.Tensor
    shown: np.ndarray  # (B,) int64, positions of the images in the source; LEFT_OUT of those left out


class Loader(BatchLoader[Batch]):
    """Iterates over epochs; made by ``make_loader``.

    Close it, or use it as a context manager: it holds threads or processes.

    Attributes:
        backend: 'dali' or 'torch'.
        batches_per_epoch: the same on every rank.
        broken: the images that could not be read or decoded so far: ``len(loader.broken)``, ``loader.broken.found``.
    """

    backend: str

    def __init__(
        self,
        source: ImageSource,
        sampler: Sampler,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype,
        broken: BrokenImages,
        num_workers: int,
        prefetch: int,
        timeout: float = DEFAULT_TIMEOUT,
    ):
        self._source, self._sampler, self._preprocessing = source, sampler, preprocessing
        self._device, self._dtype = device, dtype
        self._num_workers, self._prefetch, self._timeout = num_workers, prefetch, timeout
        self.batches_per_epoch = sampler.batches_per_epoch
        self.broken = broken
        self._running: Generator[Batch, None, None] | None = None
        self._read_ahead = DaemonThreads(1, "read-ahead")

    def batches(self, epoch: int, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Iterates over the batches of one epoch.

        Another call ends an iteration left half way. A batch stays valid for as long as it is kept.

        Args:
            epoch: >= 0.
            start_batch: in [0, batches_per_epoch], the first batch wanted: resume there.
        Raises:
            InputError: start_batch is out of range; or, while iterating, an image is broken and not to be replaced
                (the message names it).
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise InputError(f"start_batch must lie in 0..{self.batches_per_epoch}, got {start_batch}")
        self._stop()
        self._running = self._run(epoch, range(start_batch, self.batches_per_epoch))
        return self._running

    def close(self) -> None:
        """Ends the iteration and gives threads, processes and memory back."""
        self._stop()
        self._read_ahead.shutdown(cancel_futures=True)

    def count_broken(self) -> int:
        return len(self.broken)

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()

    def _run(self, epoch: int, batches: range) -> Generator[Batch, None, None]:
        requested: deque[np.ndarray] = deque()  # indices of the batches that are under way, empty ones too

        def empty() -> Iterator[Batch]:  # a rank's share of a partial last batch, or what a sampler leaves out
            while requested and not len(requested[0]):
                faces = torch.empty(0, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8)
                yield self._batch(epoch, requested[0], Decoded(faces, requested.popleft()))

        with contextlib.closing(self._decode(self._requests(epoch, batches, requested))) as answers:
            for decoded in answers:
                yield from empty()
                yield self._batch(epoch, requested.popleft(), decoded)
        yield from empty()

    def _requests(self, epoch: int, batches: range, requested: deque[np.ndarray]) -> Iterator[Request]:
        """Yields the requests of an epoch, notes them in ``requested``, and asks the disk for later ones ahead."""
        group = max(1, _READ_AHEAD * self._sampler.world_size // self._sampler.global_batch_size)
        for number, batch in enumerate(batches):
            if number % group == 0:
                ahead = range(batch if number == 0 else batch + group, min(batch + 2 * group, batches.stop))
                self._read_ahead.submit(
                    self._will_need, [self._sampler.indices(epoch, later) for later in ahead], group
                )
            indices = self._sampler.indices(epoch, batch)
            requested.append(indices)
            if len(indices):
                yield Request(indices, self._sampler.flips(epoch, indices) & self._preprocessing.horizontal_flip)

    def _will_need(self, batches: list[np.ndarray], group: int) -> None:
        for start in range(0, len(batches), group):
            self._source.will_need(np.sort(np.concatenate(batches[start : start + group])))

    def _batch(self, epoch: int, requested: np.ndarray, decoded: Decoded) -> Batch:
        faces, shown = decoded
        self.broken.replaced += int(np.count_nonzero(shown != requested))
        faces = faces.to(self._device, non_blocking=True)
        augmentation = self._preprocessing.augmentation
        if augmentation.does_something and len(requested):
            faces = augmentation.apply(faces, self._sampler.uniforms(epoch, requested, augmentation.NUM_UNIFORMS))
        if faces.dtype == torch.uint8:
            images = self._preprocessing.normalize(faces, self._dtype)
        else:
            images = faces.permute(0, 3, 1, 2)
        labels = torch.from_numpy(np.where(shown < 0, LEFT_OUT, self._source.labels[shown]))
        return Batch(images, labels.to(self._device, non_blocking=True), torch.from_numpy(shown.copy()))

    @abc.abstractmethod
    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        """Yields the answer to each request, in order; decodes ahead of the consumer and stops cleanly when closed.

        Args:
            requests: read ahead, in the calling thread.
        """
