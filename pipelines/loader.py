"""Batches of normalized faces from a source and a sampler, by NVIDIA DALI or by Pillow in worker processes.

Both backends turn the sampler's requests (indices, flips) into uint8 faces and share everything else, so they give the
same batches: same images, same flips, same augmentation, same arithmetic, same replacements of broken images.
"""

import functools
import logging
import math

import torch

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.loading.base import Loader, Preprocessing
from scf_fast.pipelines.loading.broken import BrokenImages, OnBroken
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT

_LOG = logging.getLogger(__name__)


def make_loader(
    source: ImageSource,
    sampler: Sampler,
    preprocessing: Preprocessing | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    num_workers: int = 2,
    prefetch: int = 2,
    on_broken: str = "raise",
    timeout: float = DEFAULT_TIMEOUT,
) -> Loader:
    """Returns a loader of the sampler's batches of a source.

    Args:
        source: the images.
        sampler: chooses among ``len(source)`` images.
        preprocessing: None for its defaults.
        device: where batches go; on a CUDA device DALI decodes there.
        dtype: floating-point type of the images.
        backend: 'dali', 'torch', or 'auto': DALI where it can be imported.
        num_workers: decoding threads (DALI, at least one) or processes ('torch'; 0 decodes in the calling process).
        prefetch: batches decoded ahead; the 'torch' backend keeps at least one for each process.
        on_broken: what happens at an image that cannot be read or decoded. 'raise' ends the iteration with an error
            that names it: right where every image counts. 'replace' puts the next good image of the source in its
            place, label and all, and names the broken one in the log: right for training. 'leave_out' gives a black
            face with index and label -1: right where images are embedded. See
            :class:`scf_fast.pipelines.loading.broken.BrokenImages`.
        timeout: seconds that a batch may take without any progress; an error then says what was waited for. 0: none.
    Raises:
        InputError: an argument does not fit, or backend='dali' and DALI cannot be imported.
    """
    device = torch.device(device)
    if sampler.num_samples != len(source):
        raise InputError(f"the sampler must cover the source: {sampler.num_samples} samples for {len(source)} images")
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type, got {dtype}")
    if backend not in ("auto", "dali", "torch"):
        raise InputError(f"backend must be 'auto', 'dali' or 'torch', got {backend!r}")
    if num_workers < 0 or prefetch < 1:
        raise InputError(f"num_workers must be at least 0 and prefetch at least 1, got {num_workers} and {prefetch}")
    if on_broken not in {choice.value for choice in OnBroken}:
        choices = ", ".join(repr(choice.value) for choice in OnBroken)
        raise InputError(f"on_broken must be one of {choices}, got {on_broken!r}")
    if not 0 <= timeout < math.inf:
        raise InputError(f"timeout must be 0 or more seconds, got {timeout}")
    broken = BrokenImages(source, OnBroken(on_broken))
    return _loader_class(backend)(
        source, sampler, preprocessing or Preprocessing(), device, dtype, broken, num_workers, prefetch, timeout
    )


def _loader_class(backend: str) -> type[Loader]:
    if backend != "torch":
        try:
            from scf_fast.pipelines.loading.dali import DaliLoader

            return DaliLoader
        except ImportError as error:
            if backend == "dali":
                raise InputError(
                    f"backend='dali' needs NVIDIA DALI: {error}; install nvidia-dali or use backend='torch'"
                ) from error
            _warn_once(f"images are decoded by Pillow in worker processes: NVIDIA DALI cannot be imported: {error}")
    from scf_fast.pipelines.loading.torch import TorchLoader

    return TorchLoader


@functools.cache
def _warn_once(message: str) -> None:
    _LOG.warning(message)
