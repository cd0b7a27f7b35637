import abc
import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.loading.augmentation import PRESETS, Augmentation
from scf_fast.pipelines.loading.decode import FACE_SIZE

_READ_AHEAD = (
    1 << 14
)  # images of a rank that the disk is asked for together, 160 MB: 64 blocks of 256, what a block shuffle mixes
_CENTER = 127.5
_SCALE = {
    "insightface": 127.5,  # arcface_torch: mean 0.5, std 0.5 of values in [0, 1]
    "published": 128.0,  # the published SCF code: mean 0.5, std 0.5 * 256/255
}


@dataclass(frozen=True)
class Preprocessing:
    """From decoded pixels in 0..255 to network input."""

    normalization: str = "insightface"  # (x - 127.5) / 127.5, or "published": (x - 127.5) / 128
    horizontal_flip: bool = True  # mirror each image with probability 1/2
    augmentation: Augmentation = PRESETS["none"]  # changes nothing unless told to

    def __post_init__(self):
        if self.normalization not in _SCALE:
            raise InputError(f"normalization must be one of {', '.join(_SCALE)}, got {self.normalization!r}")

    def normalize(self, faces, dtype=torch.float32):
        """Scale pixels; each result is the exact quotient rounded once to dtype, as x - 127.5 is exact in bf16 and
        wider.

        Args:
            faces: (B, H, W, 3) uint8.
            dtype: floating-point torch.dtype.
        Returns:
            (B, 3, H, W) dtype in channels_last memory format; new memory.
        """
        return (
            faces.permute(0, 3, 1, 2)
            .to(dtype, memory_format=torch.channels_last)
            .sub_(_CENTER)
            .div_(_SCALE[self.normalization])
        )


class Batch(NamedTuple):
    """One rank's share of a global batch."""

    images: torch.Tensor  # (B, 3, 112, 112) in the loader's dtype, channels_last, on its device
    labels: torch.Tensor  # (B,) int64 on the loader's device
    indices: (
        torch.Tensor
    )  # (B,) int64 on the CPU, positions in the source: of the image that is shown, also where it replaces a broken one


class Request(NamedTuple):
    """What a backend is asked for."""

    indices: np.ndarray  # (B,) int64, B > 0
    flips: np.ndarray  # (B,) bool


class Loader(abc.ABC):
    """Runs through epochs; made by make_loader. Close it, or use it as a context manager: it holds threads or
    processes.

    Attributes:
        backend: 'dali' or 'torch'.
        batches_per_epoch: int, the same on every rank.
        broken: BrokenImages, what could not be read or decoded so far; `len(loader.broken)`, `loader.broken.found`.
    """

    backend: str

    def __init__(self, source, sampler, preprocessing, device, dtype, broken):
        self._source, self._sampler, self._preprocessing = source, sampler, preprocessing
        self._device, self._dtype = device, dtype
        self.batches_per_epoch = sampler.batches_per_epoch
        self.broken = broken
        self._running = None
        self._read_ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def batches(self, epoch, start_batch=0):
        """The batches of one epoch. Asking again ends an iteration left half way; a batch stays valid for as long as it
        is kept.

        Args:
            epoch: int >= 0.
            start_batch: int in [0, number of batches], the first batch wanted: resume there.
        Returns:
            Iterator over Batch.
        Raises:
            ValueError: a start is out of range; or, while iterating, an image is broken and not to be replaced (the
                message names it).
        """
        batches = self.batches_per_epoch
        if not 0 <= start_batch <= batches:
            raise ValueError(f"start_batch must lie in 0..{batches}, got {start_batch}")
        self._stop()
        self._running = self._run(epoch, range(start_batch, batches))
        return self._running

    def close(self):
        """End the iteration and give threads, processes and memory back."""
        self._stop()
        self._read_ahead.shutdown(cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _stop(self):
        if self._running is not None:
            self._running.close()

    def _run(self, epoch, batches):
        requested = deque()

        def indices_of(batch):
            return self._sampler.indices(epoch, batch)

        def requests():
            group = max(1, _READ_AHEAD * self._sampler.world_size // self._sampler.global_batch_size)
            for number, batch in enumerate(batches):
                if number % group == 0:
                    ahead = range(batch if number == 0 else batch + group, min(batch + 2 * group, batches.stop))
                    self._read_ahead.submit(self._will_need, [indices_of(later) for later in ahead], group)
                indices = indices_of(batch)
                requested.append(indices)
                if len(indices):
                    flips = self._sampler.flips(epoch, indices)
                    yield Request(indices, flips & self._preprocessing.horizontal_flip)

        def empty():  # a rank's share of a partial last batch, or what a sampler leaves out
            while requested and not len(requested[0]):
                yield self._batch(
                    epoch, requested[0], requested.popleft(), torch.empty(0, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8)
                )

        with contextlib.closing(self._faces(requests())) as decoded:
            for faces, shown in decoded:
                yield from empty()
                yield self._batch(epoch, requested.popleft(), shown, faces)
        yield from empty()

    def _will_need(self, batches, group):
        for start in range(0, len(batches), group):
            self._source.will_need(np.sort(np.concatenate(batches[start : start + group])))

    def _batch(self, epoch, requested, shown, faces):
        self.broken.replaced += int(np.count_nonzero(shown != requested))
        faces = faces.to(self._device, non_blocking=True)
        augmentation = self._preprocessing.augmentation
        if augmentation.does_something and len(requested):
            faces = augmentation.apply(faces, self._sampler.uniforms(epoch, requested, augmentation.NUM_UNIFORMS))
        images = (
            self._preprocessing.normalize(faces, self._dtype)
            if faces.dtype == torch.uint8
            else faces.permute(0, 3, 1, 2)
        )
        labels = torch.from_numpy(self._source.labels[shown])
        return Batch(images, labels.to(self._device, non_blocking=True), torch.from_numpy(shown.copy()))

    @abc.abstractmethod
    def _faces(self, requests):
        """Decode ahead of the consumer; stop cleanly when closed.

        Args:
            requests: iterator over Request; read ahead, in this thread.
        Yields:
            For each request, in order, a (B, 112, 112, 3) tensor and the (B,) int64 positions of the images that it
            shows. The tensor is uint8, valid until the next one is asked for; or normalized, in the loader's dtype, and
            valid for as long as it is kept.
        """
