"""The loader on NVIDIA DALI: reader threads feed encoded images to a pipeline that decodes, resizes and flips them, on
the GPU where there is one.

DALI's own readers know nothing of the sampler's order, so the images come in through an external source. The reader
threads read a batch at a time and look at all its headers together, which leaves Python little to do for an image.

On a CPU the pipeline ends in normalized images: a table of the 256 quotients gives exactly the result of
``Preprocessing.normalize``, in DALI's threads and in one pass. On a GPU, with augmentation, or where DALI lacks the
type, it ends in uint8, which keeps its buffers small.

When DALI cannot decode one image, it gives up the whole pipeline and does not say which image of which batch it was. So
the reader threads look at every image first (is it complete, of a kind that DALI reads as Pillow does); they find
nearly all broken ones. For the rest, the batches that were under way when DALI gave up are searched: Pillow finds what
is broken, and bisection finds what DALI alone refuses, which it is given as pixels from then on. A new pipeline goes on
without those. Where no image is at fault, as when the device is out of memory, the iteration ends with DALI's message.
"""

import functools
import gc
import io
import itertools
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline
from PIL import Image

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.face_template import FACE_SIZE
from scf_fast.pipelines.loading import generated_files
from scf_fast.pipelines.loading.base import Decoded, Loader, Preprocessing, Request
from scf_fast.pipelines.loading.broken import BrokenImages, OnBroken
from scf_fast.pipelines.loading.decode import BLACK_FACE, is_packed, load_encoded, load_face, pack_face, read_headers
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, DaemonThreads, TimedOut, Wait, promptly, result_of

if tuple(map(int, dali_version.split(".")[:2])) < (2, 2):
    raise ImportError(
        f"DALI 2.2 or newer is needed, this is {dali_version}, which does not turn every JPEG upright as its EXIF says"
    )

_LOG = logging.getLogger(__name__)
_BLANK = pack_face(BLACK_FACE), True  # as load_encoded returns a face
_ALL_VALUES = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1)
_DTYPES = {torch.float32: types.DALIDataType.FLOAT, torch.float16: types.DALIDataType.FLOAT16}
_READ_TOGETHER = 256  # images
_Result = TypeVar("_Result")
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

    def rows(self, start: int, stop: int) -> _Fed:
        """Returns what a pipeline takes of some of its images, none mirrored."""
        return self.encoded[start:stop], np.zeros(stop - start, dtype=np.int32), self.resized[start:stop]


class _Reading(NamedTuple):
    """A request that a thread reads the files of."""

    request: Request
    future: Future[_Read]


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
        timeout: float = DEFAULT_TIMEOUT,
    ):
        super().__init__(source, sampler, preprocessing, device, dtype, broken, max(1, num_workers), prefetch, timeout)
        self._readers = DaemonThreads(self._num_workers, "face-reader")
        self._runner = DaemonThreads(1, "dali-pipeline")  # in which DALI is called, since its waits have no end
        self._awaited: Request | None = None  # that the pipeline waits for, while it does
        self._moves = 0  # counts what readers have read and the pipeline was fed, so that progress shows
        self._pipeline: Pipeline | None = None
        self._feed: Callable[[], _Fed] = _exhausted
        self._normalizes = device.type == "cpu" and dtype in _DTYPES and not preprocessing.augmentation.does_something
        # Images that Pillow reads and DALI does not: DALI gets the pixels that Pillow makes of them.
        self._converted: set[int] = set()

    def close(self) -> None:
        super().close()
        self._drop_pipeline()
        self._readers.shutdown(cancel_futures=True)
        self._runner.shutdown()

    def _drop_pipeline(self) -> None:
        """Gives up the pipeline and its memory.

        Errors leave cycles that hold pipelines: their memory is missing on the device, and a process forked later that
        collected one would wait for its threads forever.
        """
        self._pipeline = None
        gc.collect()

    def _decode(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        self._rewind()
        reading: deque[_Reading] = deque()
        decoding: deque[_Read] = deque()
        failure: Exception | None = None  # of a reader
        reads = map(self._start_reading, requests)

        def feed() -> _Fed:
            nonlocal failure
            reading.extend(itertools.islice(reads, max(0, self._prefetch + 1 - len(reading))))
            if not reading or failure is not None:
                raise StopIteration
            self._awaited = reading[0].request
            try:
                read = reading[0].future.result()
            except Exception as error:  # its turn comes when the batches before it have been delivered
                failure = error
                raise StopIteration from None
            finally:
                self._awaited = None
                self._moves += 1
            reading.popleft()  # not before: if earlier batches are decoded once more, a failed one must follow again
            decoding.append(read)
            return read.fed()

        try:
            while True:
                self._feed = feed
                if self._pipeline is None:
                    self._pipeline = self._build()
                refusal: str | None = None
                # The consumer's stream of the moment. The outputs are bound to it, so their memory is freed in its
                # order.
                stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
                try:
                    (faces,) = self._wait_for(functools.partial(self._pipeline.run, stream))
                except StopIteration:
                    break
                except RuntimeError as error:
                    refusal = str(error)
                except Exception:
                    self._drop_pipeline()
                    raise
                if refusal is not None:
                    # Outside of the handler, since the error holds the pipeline, and this its memory on the device.
                    self._drop_pipeline()
                    self._search(decoding, refusal)
                    reading.extendleft(self._start_reading(read.request) for read in reversed(decoding))
                    decoding.clear()
                    failure = None
                    continue
                yield Decoded(torch.from_dlpack(faces.as_tensor()), decoding.popleft().shown)
            if failure is not None:
                raise failure
        finally:
            for waiting in reading:
                waiting.future.cancel()

    def _start_reading(self, request: Request) -> "_Reading":
        return _Reading(request, self._readers.submit(self._read, request))

    def _wait_for(self, run: Callable[[], _Result]) -> _Result:
        """Returns the result of a call of DALI, which itself would wait for ever.

        Raises:
            TimedOut: there was no progress; the pipeline is given up as it is, since to delete it would wait too.
        """
        wait = Wait("the DALI loader", self._describe, self._timeout, lambda: self._moves)
        try:
            return result_of(self._runner.submit(run), wait)
        except TimedOut:
            self._pipeline = None  # the thread that it holds up holds it
            raise
        except RuntimeError:
            # Once the thread has come to something else, it holds neither the pipeline nor the error.
            result_of(self._runner.submit(_do_nothing), wait)
            raise

    def _describe(self) -> str:
        """Says what a call of DALI waits for."""
        request = self._awaited
        if request is None:
            return f"DALI's pipeline, which decodes on {self._device}"
        first = int(request.indices[0])
        name = promptly(lambda: self._source.name(first), f"image {first}")
        return f"a thread that reads {len(request.indices)} images for DALI's pipeline, the first of them {name}"

    def _build(
        self, batch_size: int | None = None, feed: Callable[[], _Fed] | None = None, prefetch: int | None = None
    ) -> Pipeline:
        """Builds a pipeline for this rank's share of a batch that calls ``self._feed``, unless told otherwise."""
        gpu = self._device.type == "cuda"
        device_id = self._device.index
        if gpu and device_id is None:
            device_id = torch.cuda.current_device()
        normalized = self._preprocessing.normalize(_ALL_VALUES).flatten().tolist() if self._normalizes else None
        _tidy_up()
        with generated_files.deleted_after():
            return _face_pipeline(
                feed or (lambda: self._feed()),
                "mixed" if gpu else "cpu",
                normalized,
                _DTYPES.get(self._dtype),
                batch_size=batch_size or self._sampler.global_batch_size // self._sampler.world_size,
                num_threads=self._num_workers,
                device_id=device_id if gpu else None,
                prefetch_queue_depth=prefetch or self._prefetch,
                exec_dynamic=True,
            )

    def _read(self, request: Request) -> _Read:
        shown, encoded, sizes, lengths = request.indices.copy(), [], [], []
        for start in range(0, len(shown), _READ_TOGETHER):  # in parts, so that a slow disk shows its progress
            read = self._source.read(shown[start : start + _READ_TOGETHER])
            sizes.append(read_headers(*read))
            ends = read.starts + read.lengths
            encoded += [read.data[begin:end] for begin, end in zip(read.starts.tolist(), ends.tolist())]
            lengths.append(read.lengths)
            self._moves += 1
        return self._checked(request, shown, encoded, np.concatenate(sizes), np.concatenate(lengths))

    def _checked(
        self,
        request: Request,
        shown: np.ndarray,
        encoded: list[np.ndarray],
        sizes: np.ndarray,
        lengths: np.ndarray,
    ) -> _Read:
        """Puts what DALI can decode in the place of files that it cannot, and the next good image in that of a broken
        one.

        Args:
            shown: (B,) positions; changed.
            encoded: B files; changed.
            sizes: (B, 2) of the images, 0 where there is a doubt.
            lengths: (B,) of the files, 0 where one was not read.
        """
        resized = (sizes != FACE_SIZE).any(axis=1)
        doubtful = (sizes[:, 0] == 0) | self.broken.known(shown)
        if self._converted:
            doubtful |= np.isin(shown, list(self._converted))
        for row in np.flatnonzero(doubtful).tolist():
            i = int(shown[row])
            load = functools.partial(self._load, i, encoded[row] if lengths[row] else None)
            shown[row], (encoded[row], is_face_sized) = self.broken.load(i, load, _BLANK)
            resized[row] = not is_face_sized
            self._moves += 1
        return _Read(request, shown, encoded, resized)

    def _load(self, i: int, read: np.ndarray | None, j: int) -> tuple[np.ndarray, bool]:
        """Loads image j for ``load_encoded``; ``read`` is the file of image i where that was read already."""
        return load_encoded(self._source, j, j in self._converted, read if j == i else None)

    def _search(self, decoding: Sequence[_Read], refusal: str) -> None:
        """Finds the images that made DALI give up among those under way, and sees to it that they do not again.

        Each call that returns has found an image that was not known before, so there is an end to them.

        Args:
            decoding: the batches that DALI was given.
            refusal: its message.
        Raises:
            InputError: an image is broken and broken images are not to be replaced; or no image is at fault.
        """
        shown = list(dict.fromkeys(itertools.chain.from_iterable(read.shown.tolist() for read in decoding)))
        shown = [i for i in shown if i >= 0]  # not those left out
        looks = [self._readers.submit(self._decoding_error, i) for i in shown]
        errors = [
            result_of(look, Wait("the DALI loader", f"Pillow, which decodes {self._source.name(i)}", self._timeout))
            for i, look in zip(shown, looks)
        ]
        found = {i: str(error) for i, error in zip(shown, errors) if error is not None}
        if found:
            if self.broken.on_broken is OnBroken.RAISE:
                raise InputError(next(iter(found.values())))
            self.broken.add(found)
            return
        if self._is_refused(_PROBE):
            raise _decoder_failure(refusal)
        refused = {i for read in decoding for i in self._refused(read, 0, len(read.encoded))}
        if not refused:
            raise _decoder_failure(refusal)
        for i in sorted(refused - self._converted):
            self._converted.add(i)
            _LOG.warning("DALI refuses an image that Pillow decodes, and gets its pixels: %s", self._source.name(i))

    def _refused(self, read: _Read, start: int, stop: int) -> list[int]:
        """Returns the positions of the images that DALI refuses among rows start to stop of a batch, by bisection;
        without those that it was given as pixels, which is nothing that it could refuse.
        """
        if not self._is_refused(read.rows(start, stop)):
            return []
        if stop - start == 1:
            return [] if is_packed(read.encoded[start]) else [int(read.shown[start])]
        middle = (start + stop) // 2
        return self._refused(read, start, middle) + self._refused(read, middle, stop)

    def _is_refused(self, fed: _Fed) -> bool:
        """Tells whether DALI cannot decode a batch, in a pipeline of its own: one that has failed is of no more use."""
        try:
            self._wait_for(self._build(len(fed[0]), lambda: fed, prefetch=1).run)
        except RuntimeError:
            return True
        return False

    def _decoding_error(self, i: int) -> InputError | None:
        """Returns the error of decoding image i by Pillow."""
        try:
            load_face(self._source, i)
        except InputError as error:
            return error
        return None

    def _rewind(self) -> None:
        """Readies the pipeline for another iteration: takes out what was decoded ahead for one left half way."""
        if self._pipeline is None:
            return
        self._feed = _exhausted
        try:
            while True:
                self._wait_for(self._pipeline.run)
        except StopIteration:
            self._pipeline.reset()
            return
        except RuntimeError:  # a broken image in a batch that is no longer wanted
            pass
        self._drop_pipeline()


@functools.cache
def _tidy_up() -> None:
    """Deletes what earlier processes have left in the temporary folder, once a process."""
    count = generated_files.delete_left_over("_face_pipeline")
    if count:
        _LOG.info("deleted %d files that killed runs have left in %s", count, tempfile.gettempdir())


def _do_nothing() -> None:
    pass


def _exhausted() -> _Fed:
    raise StopIteration


def _probe() -> _Fed:
    """Returns a batch of one image that every decoder reads: a gray face, in JPEG."""
    file = io.BytesIO()
    Image.new("RGB", (FACE_SIZE, FACE_SIZE), (128, 128, 128)).save(file, "JPEG")
    return [np.frombuffer(file.getvalue(), dtype=np.uint8)], np.zeros(1, dtype=np.int32), np.zeros(1, dtype=bool)


_PROBE = _probe()


def _decoder_failure(refusal: str) -> InputError:
    """Returns the error of a decoder that fails whatever the images."""
    lines = [line for line in map(str.strip, refusal.splitlines()) if line]
    noise = ("Critical error in pipeline", "Current pipeline object is no longer valid", "which was used", 'File "')
    message = " ".join(line for line in lines if not line.startswith(noise))
    return InputError(
        f"DALI cannot decode, and no image is at fault: {message or 'it does not say why'}; if memory is short, take "
        "smaller batches or end what else runs on the device; backend='torch' decodes without DALI"
    )
