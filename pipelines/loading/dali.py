"""The loader on NVIDIA DALI: reader threads hand encoded images to a pipeline that decodes, resizes and flips them, on
the GPU where there is one.

DALI's own readers know nothing of the sampler's order, so the images come in through an external source. The reader
threads read a batch at a time and look at all its headers together, which leaves Python little to do for an image.

On a CPU the pipeline ends in normalized images: a table of the 256 quotients gives exactly what Preprocessing.normalize
does, in DALI's threads and in one pass. On a GPU, with augmentation, or where DALI lacks the type, it ends in uint8,
which keeps its buffers small.

DALI gives the whole pipeline up where it cannot decode one image, and does not say which. So the reader threads look at
every image first (is it whole, of a kind that DALI reads as Pillow does); they find nearly all broken ones. For the
rest, the images that were under way when DALI gave up are decoded again one by one, and a new pipeline goes on without
the broken ones.
"""

import gc
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version
from nvidia.dali import fn, pipeline_def, types

from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.loading.base import Loader, Request
from scf_fast.pipelines.loading.decode import FACE_SIZE, load_encoded, load_face, read_headers

if tuple(map(int, dali_version.split(".")[:2])) < (2, 2):
    raise ImportError(
        f"DALI 2.2 or newer is needed, this is {dali_version}, which does not turn every JPEG upright as its EXIF says"
    )

_ALL_VALUES = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1)
_DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}


@pipeline_def(enable_conditionals=True)
def _face_pipeline(feed, decoder_device, normalized, dtype):
    """(B, 112, 112, 3) from encoded images, flips and whether to resize, as
    scf_fast.pipelines.loading.decode.decode_face defines it; uint8, or where `normalized` holds what each of the 256
    values becomes, that in `dtype`.
    """
    encoded, flips, resized = fn.external_source(feed, num_outputs=3, batch=True)
    faces = fn.decoders.image(encoded, device=decoder_device, output_type=types.RGB, jpeg_fancy_upsampling=True)
    if resized:  # resizing faces that have the size already would halve the speed
        faces = fn.resize(faces, size=[FACE_SIZE, FACE_SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
    faces = fn.flip(faces, horizontal=flips)
    return (
        faces if normalized is None else fn.lookup_table(faces, keys=list(range(256)), values=normalized, dtype=dtype)
    )


class _Read(NamedTuple):
    """A request with the image files that it needs."""

    request: Request
    shown: np.ndarray  # (B,) int64, positions of the images that were read
    encoded: list  # B (bytes,) uint8 arrays
    resized: np.ndarray  # (B,) bool, which are not of the face's size


class DaliLoader(Loader):
    """See scf_fast.pipelines.loader.make_loader. The pipeline is built with the first batch and lives until close()."""

    backend = "dali"

    def __init__(self, source, sampler, preprocessing, device, dtype, broken, num_workers, prefetch):
        super().__init__(source, sampler, preprocessing, device, dtype, broken)
        self._num_threads, self._prefetch = max(1, num_workers), prefetch
        self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="face-reader")
        self._pipeline = None
        self._feed = None
        self._normalizes = device.type == "cpu" and dtype in _DTYPES and not preprocessing.augmentation.does_something
        self._converted = set()  # images that Pillow reads and DALI does not: DALI gets them as Pillow sees them

    def close(self):
        super().close()
        self._pipeline = None
        # errors leave cycles that hold pipelines; a process forked later that collected one would wait for its threads
        # forever
        gc.collect()
        self._readers.shutdown()

    def _faces(self, requests):
        self._rewind()
        reading, decoding, failure = deque(), deque(), None
        reads = (self._readers.submit(self._read, request) for request in requests)

        def feed():
            nonlocal failure
            reading.extend(itertools.islice(reads, max(0, self._prefetch + 1 - len(reading))))
            if not reading or failure is not None:
                raise StopIteration
            try:
                read = reading.popleft().result()
            except ValueError as error:  # its turn comes when the batches before it have been delivered
                failure = error
                raise StopIteration from None
            decoding.append(read)
            return read.encoded, read.request.flips.astype(np.int32), read.resized

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
                    if not self._blame(decoding):
                        raise
                    reading.extendleft(self._readers.submit(self._read, read.request) for read in reversed(decoding))
                    decoding.clear()
                    failure = None
                    continue
                except Exception:
                    self._pipeline = None
                    raise
                yield torch.from_dlpack(faces.as_tensor()), decoding.popleft().shown
            if failure is not None:
                raise failure
        finally:
            for read in reading:
                read.cancel()

    def _build(self, batch_size=None, feed=None):
        gpu = self._device.type == "cuda"
        device_id = (
            torch.cuda.current_device() if gpu and self._device.index is None else self._device.index if gpu else None
        )
        normalized = self._preprocessing.normalize(_ALL_VALUES).flatten().tolist() if self._normalizes else None
        return _face_pipeline(
            feed or (lambda: self._feed()),
            "mixed" if gpu else "cpu",
            normalized,
            _DTYPES.get(self._dtype),
            batch_size=batch_size or self._sampler.global_batch_size // self._sampler.world_size,
            num_threads=self._num_threads,
            device_id=device_id,
            prefetch_queue_depth=self._prefetch,
            exec_dynamic=True,
        )

    def _read(self, request):
        shown = request.indices.copy()
        data, starts, lengths = self._source.read(shown)
        sizes = read_headers(data, starts, lengths)
        resized = (sizes != FACE_SIZE).any(axis=1)
        encoded = [data[start:end] for start, end in zip(starts.tolist(), (starts + lengths).tolist())]
        doubtful = (sizes[:, 0] == 0) | self.broken.known(shown)
        if self._converted:
            doubtful |= np.isin(shown, list(self._converted))
        for row in np.flatnonzero(doubtful).tolist():
            i, read = int(shown[row]), encoded[row] if lengths[row] else None
            shown[row], (encoded[row], is_face_sized) = self.broken.load(
                i,
                lambda j, i=i, read=read: load_encoded(self._source, j, j in self._converted, read if j == i else None),
            )
            resized[row] = not is_face_sized
        return _Read(request, shown, encoded, resized)

    def _blame(self, decoding):
        """Find the images that DALI cannot decode among those under way. Whether there were any.

        Raises:
            ValueError: one is broken and broken images are not to be replaced.
        """
        under_way = [
            (i, (encoded, resized))
            for read in decoding
            for i, encoded, resized in zip(read.shown.tolist(), read.encoded, read.resized)
        ]
        found = {}
        for (i, _), error in zip(
            under_way, self._readers.map(lambda image: _error_of(load_face, self._source, image[0]), under_way)
        ):
            if error is not None:
                found[i] = str(error)
        if found:
            if not self.broken.replaces:
                raise InputError(next(iter(found.values())))
            self.broken.add(found)
            return True
        refused = {i for i, image in under_way if not self._decodes(*image)}
        self._converted |= refused
        return bool(refused)

    def _decodes(self, encoded, resized):
        """Whether DALI can decode an image, tried on its own."""
        try:
            self._build(1, lambda: ([encoded], np.zeros(1, dtype=np.int32), np.array([resized]))).run()
        except RuntimeError:
            return False
        return True

    def _rewind(self):
        """Take out what was decoded ahead for an iteration left half way, and make the pipeline ready for the next
        one.
        """
        if self._pipeline is None:
            return
        self._feed = _exhausted
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a broken image in a batch that nobody wants any more
            self._pipeline = None


def _error_of(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return error
    return None


def _exhausted():
    raise StopIteration
