"""The loader for machines without DALI: Pillow in worker processes, a whole batch per task."""

from collections.abc import Callable, Generator, Iterator
from itertools import islice

import numpy as np
import torch

from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading.base import Decoded, Loader, Preprocessing, Request
from scf_fast.pipelines.loading.broken import BrokenImages, OnBroken
from scf_fast.pipelines.loading.decode import BLACK_FACE, load_face
from scf_fast.pipelines.loading.workers import DecodingProcesses
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, DaemonThreads, Wait, promptly, result_of


class TorchLoader(Loader):
    """The loader on processes, which start with the first batch and live until ``close()``; without any, it decodes in
    a thread, one batch after the other.
    """

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
        timeout: float = DEFAULT_TIMEOUT,
    ):
        super().__init__(source, sampler, preprocessing, device, dtype, broken, num_workers, prefetch, timeout)
        self._decode_batch = _BatchDecoder(source, broken.on_broken)
        self._processes: DecodingProcesses | None = None
        self._thread = DaemonThreads(1, "face-decoder")

    def close(self) -> None:
        super().close()
        self._end_processes()
        self._thread.shutdown()

    def _end_processes(self) -> None:
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        return self._decode_in_processes(requests) if self._num_workers else self._decode_here(requests)

    def _decode_in_processes(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        if self._processes is None or self._processes.closed:
            self._processes = DecodingProcesses(
                self._decode_batch,
                self._source.name,
                self._num_workers,
                self._sampler.global_batch_size // self._sampler.world_size,
                max(self._prefetch, self._num_workers),
                self._timeout,
            )
        processes = self._processes
        processes.cancel()  # of an iteration left half way
        for request in islice(requests, processes.ahead):
            processes.submit(request)
        while processes.under_way:
            answer = processes.receive()
            for request in islice(requests, 1):
                processes.submit(request)
            self.broken.add(answer.found)
            faces = torch.from_numpy(answer.faces)
            yield Decoded(faces.pin_memory() if self._device.type == "cuda" else faces, answer.shown)

    def _decode_here(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        begun, image = 0, -1

        def note(i: int) -> None:
            nonlocal begun, image
            begun, image = begun + 1, i

        for request in requests:
            count = len(request.indices)
            faces = np.empty((count, FACE_SIZE, FACE_SIZE, 3), dtype=np.uint8)
            shown = np.empty(count, dtype=np.int64)
            wait = Wait(
                "the torch loader",
                lambda: promptly(lambda: self._source.name(image), f"image {image}"),
                self._timeout,
                lambda: begun,
            )
            self.broken.add(result_of(self._thread.submit(self._decode_batch, request, faces, shown, note), wait))
            yield Decoded(torch.from_numpy(faces), shown)


class _BatchDecoder:
    """Decodes batches by Pillow; each process finds out by itself what is broken, and the loader logs it."""

    def __init__(self, source: ImageSource, on_broken: OnBroken):
        self._source = source
        self._broken = BrokenImages(source, on_broken, log=False)

    def __call__(
        self, request: Request, faces: np.ndarray, shown: np.ndarray, note: Callable[[int], None]
    ) -> dict[int, str]:
        known = len(self._broken.found)

        def load(i: int) -> np.ndarray:
            note(i)
            return load_face(self._source, i)

        for row, (i, flip) in enumerate(zip(request.indices.tolist(), request.flips.tolist())):
            shown[row], face = self._broken.load(i, load, BLACK_FACE)
            faces[row] = face[:, :: -1 if flip else 1]
        return dict(list(self._broken.found.items())[known:])
