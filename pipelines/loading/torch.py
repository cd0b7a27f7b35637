"""The loader for machines without DALI: Pillow in PyTorch worker processes, a whole batch per task."""

import functools
import gc
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading.base import Decoded, Loader, Preprocessing, Request
from scf_fast.pipelines.loading.broken import BrokenImages, OnBroken
from scf_fast.pipelines.loading.decode import BLACK_FACE, load_face
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource


class TorchLoader(Loader):
    """The loader on PyTorch workers, which start with the first batch and live until ``close()``."""

    backend = "torch"

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
    ):
        super().__init__(source, sampler, preprocessing, device, dtype, broken, num_workers, prefetch)
        self._epoch_requests = _Requests()
        self._started = False
        self._workers: DataLoader | None = DataLoader(
            _FaceBatches(source, broken.on_broken),
            batch_size=None,
            sampler=self._epoch_requests,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=-(-prefetch // num_workers) if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else each epoch would draw from the generator of dropout
        )

    def close(self) -> None:
        super().close()
        self._workers = None  # the last reference to the worker processes, which end with it

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        assert self._workers is not None, "the loader is closed"
        self._epoch_requests.requests = requests
        if self._num_workers and not self._started:
            # A forked worker that collected a DALI pipeline left over here would wait for its threads forever.
            gc.collect()
            self._started = True
        for answer in self._workers:
            if isinstance(answer, InputError):
                raise answer
            self.broken.add(answer.found)
            yield Decoded(answer.faces, answer.shown.numpy())


class _Requests:
    """The sampler of the ``DataLoader``, which iterates over it once in each epoch."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Answer(NamedTuple):
    """A worker's answer to a request, in types that ``DataLoader`` sends between processes."""

    faces: torch.Tensor  # (B, 112, 112, 3) uint8
    shown: torch.Tensor  # (B,) int64
    found: dict[int, str]  # broken images that this worker has just found: position -> message


class _FaceBatches(Dataset[_Answer | InputError]):
    """Maps a request to its faces, or to the InputError that names a broken image.

    An error raised in a worker would reach the user as its traceback in text; returned, it stays one line.
    """

    def __init__(self, source: ImageSource, on_broken: OnBroken):
        self._source = source
        self._broken = BrokenImages(source, on_broken, log=False)  # each worker finds out by itself; the loader logs

    def __getitem__(self, request: Request) -> _Answer | InputError:
        known = len(self._broken.found)
        faces = np.empty((len(request.indices), FACE_SIZE, FACE_SIZE, 3), dtype=np.uint8)
        shown = np.empty(len(request.indices), dtype=np.int64)
        try:
            for row, (i, flip) in enumerate(zip(request.indices.tolist(), request.flips.tolist())):
                shown[row], face = self._broken.load(i, functools.partial(load_face, self._source), BLACK_FACE)
                faces[row] = face[:, :: -1 if flip else 1]
        except InputError as error:
            return error
        found = dict(list(self._broken.found.items())[known:])
        return _Answer(torch.from_numpy(faces), torch.from_numpy(shown), found)
