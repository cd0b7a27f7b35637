"""The loader on NVIDIA DALI: reader threads feed encoded images to a pipeline that decodes, resizes and flips them, on
the GPU where there is one.

DALI's own readers know nothing of the sampler's order, so the images come in through an external source. The reader
threads read a batch at a time and look at all its headers together, which leaves Python little to do for an image.

On a CPU the pipeline ends in normalized images: a table of the 256 quotients gives exactly the result of
``Preprocessing.normalize``, in DALI's threads and in one pass. On a GPU, with augmentation, or where DALI lacks the
type, it ends in uint8, which keeps its buffers small.

When DALI cannot decode one image, it gives up the whole pipeline and does not say which image it was. So the reader
threads look at every image first (is it complete, of a kind that DALI reads as Pillow does); they find nearly all
broken ones. For the rest, the images that were under way when DALI gave up are decoded again one by one, and a new
pipeline goes on without the broken ones.
"""

import functools
import gc
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading.base import Decoded, Loader, Preprocessing, Request
from scf_fast.pipelines.loading.broken import BrokenImages
from scf_fast.pipelines.loading.decode import load_encoded, load_face, read_headers
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource

if tuple(map(int, dali_version.split(".")[:2])) < (2, 2):
    raise ImportError(
        f"DALI 2.2 or newer is needed, this is {dali_version}, which does not turn every JPEG upright as its EXIF says"
    )

_ALL_VALUES = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1)
_DTYPES = {torch.float32: types.DALIDataType.FLOAT, torch.float16: types.DALIDataType.FLOAT16}
_Fed = tuple[list[np.ndarray], np.ndarray, np.ndarray]  # encoded images, flips, and whether to resize, of a batch


@pipeline_def(enable_conditionals=True)
def _face_pipeline(
    feed: Callable[[], _Fed], decoder_device: str, normalized: list[float] | None, dtype: types.DALIDataType | None
) -> DataNode:
    """Decodes faces as ``decode.decode_face`` defines it: (B, 112, 112, 3).

    Args:
        feed: returns the next batch.
        decoder_device: "cpu", or "mixed" for the GPU.
        normalized: (256,) the value that each pixel value becomes, in ``dtype``; None leaves them uint8.
        dtype: as said.
    """
    encoded, flips, resized = fn.external_source(feed, num_outputs=3, batch=True)
    faces = fn.decoders.image(
        encoded, device=decoder_device, output_type=types.DALIImageType.RGB, jpeg_fancy_upsampling=True
    )
    if resized:  # resizing faces that have the size already would halve the speed
        faces = fn.resize(  # type: ignore[assignment]  # declared for any number of batches, and is given one
            faces, size=[FACE_SIZE, FACE_SIZE], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
        )
    faces = fn.flip(faces, horizontal=flips)
    return (
        faces if normalized is None else fn.lookup_table(faces, keys=list(range(256)), values=normalized, dtype=dtype)
    )


class _Read(NamedTuple):
    """A request with the image files that it needs."""

    request: Request
    shown: np.ndarray  # (B,) int64, positions of the images that were read
    encoded: list[np.ndarray]  # B (bytes,) uint8 arrays
    resized: np.ndarray  # (B,) bool, which do not have the face's size

    def fed(self) -> _Fed:
        """Returns what the pipeline takes of it."""
        return self.encoded, self.request.flips.astype(np.int32), self.resized


class _UnderWay(NamedTuple):
    """One image that the pipeline was given."""

    position: int  # in the source
    encoded: np.ndarray  # (bytes,) uint8
    resized: bool


class DaliLoader(Loader):
    """The loader on DALI. Its pipeline is built with the first batch and lives until ``close()``."""

    backend = "dali"

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
        super().__init__(source, sampler, preprocessing, device, dtype, broken, max(1, num_workers), prefetch)
        self._readers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="face-reader")
        self._pipeline: Pipeline | None = None
        self._feed: Callable[[], _Fed] = _exhausted
        self._normalizes = device.type == "cpu" and dtype in _DTYPES and not preprocessing.augmentation.does_something
        # Images that Pillow reads and DALI does not: DALI gets the pixels that Pillow makes of them.
        self._converted: set[int] = set()

    def close(self) -> None:
        super().close()
        self._pipeline = None
        # Errors leave cycles that hold pipelines; a process forked later that collected one would wait for its threads
        # forever.
        gc.collect()
        self._readers.shutdown()

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        self._rewind()
        reading: deque[Future[_Read]] = deque()
        decoding: deque[_Read] = deque()
        failure: InputError | None = None
        reads = (self._readers.submit(self._read, request) for request in requests)

        def feed() -> _Fed:
            nonlocal failure
            reading.extend(itertools.islice(reads, max(0, self._prefetch + 1 - len(reading))))
            if not reading or failure is not None:
                raise StopIteration
            try:
                read = reading.popleft().result()
            except InputError as error:  # its turn comes when the batches before it have been delivered
                failure = error
                raise StopIteration from None
            decoding.append(read)
            return read.fed()

        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            while True:
                self._feed = feed
                if self._pipeline is None:
                    self._pipeline = self._build()
                try:
                    (faces,) = self._pipeline.run(stream)  # bound to this stream, so its buffer is freed in its order
                except StopIteration:
                    break
                except RuntimeError:
                    self._pipeline = None  # its state is undefined now
                    if not self._find_undecodable(decoding):
                        raise
                    reading.extendleft(self._readers.submit(self._read, read.request) for read in reversed(decoding))
                    decoding.clear()
                    failure = None
                    continue
                except Exception:
                    self._pipeline = None
                    raise
                yield Decoded(torch.from_dlpack(faces.as_tensor()), decoding.popleft().shown)
            if failure is not None:
                raise failure
        finally:
            for waiting in reading:
                waiting.cancel()

    def _build(self, batch_size: int | None = None, feed: Callable[[], _Fed] | None = None) -> Pipeline:
        """Builds a pipeline for this rank's share of a batch that calls ``self._feed``, unless told otherwise."""
        gpu = self._device.type == "cuda"
        device_id = self._device.index
        if gpu and device_id is None:
            device_id = torch.cuda.current_device()
        normalized = self._preprocessing.normalize(_ALL_VALUES).flatten().tolist() if self._normalizes else None
        return _face_pipeline(
            feed or (lambda: self._feed()),
            "mixed" if gpu else "cpu",
            normalized,
            _DTYPES.get(self._dtype),
            batch_size=batch_size or self._sampler.global_batch_size // self._sampler.world_size,
            num_threads=self._num_workers,
            device_id=device_id if gpu else None,
            prefetch_queue_depth=self._prefetch,
            exec_dynamic=True,
        )

    def _read(self, request: Request) -> _Read:
        shown = request.indices.copy()
        data, starts, lengths = self._source.read(shown)
        sizes = read_headers(data, starts, lengths)
        resized = (sizes != FACE_SIZE).any(axis=1)
        encoded = [data[start:end] for start, end in zip(starts.tolist(), (starts + lengths).tolist())]
        doubtful = (sizes[:, 0] == 0) | self.broken.known(shown)
        if self._converted:
            doubtful |= np.isin(shown, list(self._converted))
        for row in np.flatnonzero(doubtful).tolist():
            i = int(shown[row])
            load = functools.partial(self._load, i, encoded[row] if lengths[row] else None)
            shown[row], (encoded[row], is_face_sized) = self.broken.load(i, load)
            resized[row] = not is_face_sized
        return _Read(request, shown, encoded, resized)

    def _load(self, i: int, read: np.ndarray | None, j: int) -> tuple[np.ndarray, bool]:
        """Loads image j for ``load_encoded``; ``read`` is the file of image i where that was read already."""
        return load_encoded(self._source, j, j in self._converted, read if j == i else None)

    def _find_undecodable(self, decoding: Sequence[_Read]) -> bool:
        """Finds the images that DALI cannot decode among those under way. Returns whether there are any.

        Raises:
            InputError: one is broken and broken images are not to be replaced.
        """
        under_way = [
            _UnderWay(*image) for read in decoding for image in zip(read.shown.tolist(), read.encoded, read.resized)
        ]
        errors = list(self._readers.map(self._decoding_error, (image.position for image in under_way)))
        found = {image.position: str(error) for image, error in zip(under_way, errors) if error is not None}
        if found:
            if not self.broken.replaces:
                raise InputError(next(iter(found.values())))
            self.broken.add(found)
            return True
        refused = {image.position for image in under_way if not self._decodes(image)}
        self._converted |= refused
        return bool(refused)

    def _decoding_error(self, i: int) -> InputError | None:
        """Returns the error of decoding image i by Pillow."""
        try:
            load_face(self._source, i)
        except InputError as error:
            return error
        return None

    def _decodes(self, image: _UnderWay) -> bool:
        """Tells whether DALI can decode an image, tried on its own."""
        fed = [image.encoded], np.zeros(1, dtype=np.int32), np.array([image.resized])
        try:
            self._build(1, lambda: fed).run()
        except RuntimeError:
            return False
        return True

    def _rewind(self) -> None:
        """Readies the pipeline for another iteration: takes out what was decoded ahead for one left half way."""
        if self._pipeline is None:
            return
        self._feed = _exhausted
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a broken image in a batch that is no longer wanted
            self._pipeline = None


def _exhausted() -> _Fed:
    raise StopIteration
