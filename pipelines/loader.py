"""Batches of normalised faces from a source and a sampler, by NVIDIA DALI or by PyTorch workers.

Both backends turn the sampler's requests (indices, flips) into uint8 faces and share everything else, so they give the same
batches: same images, same flips, same arithmetic.
"""
import abc
import contextlib
import functools
import logging
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipelines.images import FACE_SIZE

_LOG = logging.getLogger(__name__)
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

    def __post_init__(self):
        if self.normalization not in _SCALE:
            raise ValueError(f"normalization must be one of {', '.join(_SCALE)}, got {self.normalization!r}")

    def normalize(self, faces, dtype=torch.float32):
        """Scale pixels; each result is the exact quotient rounded once to dtype, as x - 127.5 is exact in bf16 and wider.

        Args:
            faces: (B, H, W, 3) uint8.
            dtype: floating-point torch.dtype.
        Returns:
            (B, 3, H, W) dtype in channels_last memory format; new memory.
        """
        return faces.permute(0, 3, 1, 2).to(dtype, memory_format=torch.channels_last).sub_(_CENTER).div_(_SCALE[self.normalization])


class Batch(NamedTuple):
    """One rank's share of a global batch."""

    images: torch.Tensor  # (B, 3, 112, 112) in the loader's dtype, channels_last, on its device
    labels: torch.Tensor  # (B,) int64 on the loader's device
    indices: torch.Tensor  # (B,) int64 on the CPU, positions in the source


class Loader(abc.ABC):
    """Runs through epochs; made by make_loader. Close it, or use it as a context manager: it holds threads or processes.

    Attributes:
        backend: 'dali' or 'torch'.
        batches_per_epoch: int, the same on every rank.
    """

    backend: str

    def __init__(self, source, sampler, preprocessing, device, dtype):
        self._source, self._sampler, self._preprocessing = source, sampler, preprocessing
        self._device, self._dtype = device, dtype
        self.batches_per_epoch = sampler.batches_per_epoch
        self._running = None

    def batches(self, epoch, start_batch=0):
        """The batches of one epoch. Asking again ends an iteration left half way; a batch stays valid for as long as it is kept.

        Args:
            epoch: int >= 0.
            start_batch: int in [0, batches_per_epoch], the first batch wanted: resume there.
        Returns:
            Iterator over Batch.
        Raises:
            ValueError: start_batch is out of range; or, while iterating, an image cannot be decoded (the message names it).
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch must lie in 0..{self.batches_per_epoch}, got {start_batch}")
        self._stop()
        self._running = self._run(epoch, start_batch)
        return self._running

    def close(self):
        """End the iteration and give threads, processes and memory back."""
        self._stop()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _stop(self):
        if self._running is not None:
            self._running.close()

    def _run(self, epoch, start_batch):
        requested = deque()

        def requests():
            for batch in range(start_batch, self.batches_per_epoch):
                indices = self._sampler.indices(epoch, batch)
                requested.append(indices)
                if len(indices):
                    flips = self._sampler.flips(epoch, indices)
                    yield indices, flips & self._preprocessing.horizontal_flip

        with contextlib.closing(self._faces(requests())) as decoded:
            for faces in decoded:
                yield self._batch(requested.popleft(), faces)
        if requested:  # a rank's share of a partial last batch can be empty
            yield self._batch(requested.popleft(), torch.empty(0, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8))

    def _batch(self, indices, faces):
        images = self._preprocessing.normalize(faces.to(self._device, non_blocking=True), self._dtype)
        labels = torch.from_numpy(self._source.labels[indices])
        return Batch(images, labels.to(self._device, non_blocking=True), torch.from_numpy(indices.copy()))

    @abc.abstractmethod
    def _faces(self, requests):
        """Decode ahead of the consumer; stop cleanly when closed.

        Args:
            requests: iterator over (indices (B,) int64, flips (B,) bool) NumPy arrays, B > 0; read ahead, in this thread.
        Yields:
            (B, 112, 112, 3) uint8 tensor for each request, in order, valid until the next one is asked for.
        """


def make_loader(source, sampler, preprocessing=None, *, device="cpu", dtype=torch.float32, backend="auto", num_workers=2, prefetch=2):
    """A loader for a source.

    Args:
        source: ImageSource.
        sampler: EpochSampler over len(source) images.
        preprocessing: Preprocessing, or None for its defaults.
        device: where batches go; on a CUDA device DALI decodes there.
        dtype: floating-point torch.dtype of the images.
        backend: 'dali', 'torch', or 'auto': DALI where it can be imported.
        num_workers: decoding threads (DALI, at least one) or processes (PyTorch; 0 decodes in the calling process).
        prefetch: batches decoded ahead; the PyTorch backend keeps at least one for each process.
    Returns:
        Loader.
    Raises:
        ValueError: an argument does not fit, or backend='dali' and DALI cannot be imported.
    """
    device = torch.device(device)
    if sampler.num_samples != len(source):
        raise ValueError(f"the sampler must cover the source: {sampler.num_samples} samples for {len(source)} images")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    if backend not in ("auto", "dali", "torch"):
        raise ValueError(f"backend must be 'auto', 'dali' or 'torch', got {backend!r}")
    if num_workers < 0 or prefetch < 1:
        raise ValueError(f"num_workers must be at least 0 and prefetch at least 1, got {num_workers} and {prefetch}")
    return _loader_class(backend)(source, sampler, preprocessing or Preprocessing(), device, dtype, num_workers, prefetch)


def _loader_class(backend):
    if backend != "torch":
        try:
            from pipelines.dali import DaliLoader

            return DaliLoader
        except ImportError as error:
            if backend == "dali":
                raise ValueError(f"backend='dali' needs NVIDIA DALI: {error}; install nvidia-dali or use backend='torch'") from error
            _warn_once(f"reading images with PyTorch workers, because NVIDIA DALI cannot be imported: {error}")
    from pipelines.torch_loader import TorchLoader

    return TorchLoader


@functools.cache
def _warn_once(message):
    _LOG.warning(message)
