"""The loader on NVIDIA DALI: reader threads hand encoded images to a pipeline that decodes, resizes and flips them, on the GPU
where there is one.

DALI's own readers know nothing of the sampler's order, so the images come in through an external source. The pipeline ends in
uint8: the conversion to the training dtype copies anyway, so it frees DALI's buffer for reuse and costs no copy of its own.

DALI gives the whole pipeline up where it cannot decode one image, and does not say which. So the reader threads look at every image
first (is it whole, of a kind that DALI reads as Pillow does); they find nearly all broken ones. For the rest, the images that were under
way when DALI gave up are decoded again one by one, and a new pipeline goes on without the broken ones.
"""
import gc
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.images import FACE_SIZE, load_encoded, load_face
from pipelines.loader import Loader, Request


@pipeline_def(enable_conditionals=True)
def _face_pipeline(feed, decoder_device):
    """(B, 112, 112, 3) uint8 from encoded images and flips, as pipelines.images.decode_face defines it."""
    encoded, flips = fn.external_source(feed, num_outputs=2, batch=True)
    faces = fn.decoders.image(encoded, device=decoder_device, output_type=types.RGB, jpeg_fancy_upsampling=True)
    shape = fn.peek_image_shape(encoded)
    if (shape[0] != FACE_SIZE) or (shape[1] != FACE_SIZE):  # resizing faces that have the size already would halve the speed
        faces = fn.resize(faces, size=[FACE_SIZE, FACE_SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(faces, horizontal=flips)


class _Read(NamedTuple):
    """A request with the image files that it needs."""

    request: Request
    shown: np.ndarray  # (B,) int64, positions of the images that were read
    encoded: list  # B (bytes,) uint8 arrays


class DaliLoader(Loader):
    """See pipelines.loader.make_loader. The pipeline is built with the first batch and lives until close()."""

    backend = "dali"

    def __init__(self, source, sampler, preprocessing, device, dtype, broken, num_workers, prefetch):
        super().__init__(source, sampler, preprocessing, device, dtype, broken)
        self._num_threads, self._prefetch = max(1, num_workers), prefetch
        self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="face-reader")
        self._pipeline = None
        self._feed = None
        self._converted = set()  # images that Pillow reads and DALI does not: DALI gets them as Pillow sees them

    def close(self):
        super().close()
        self._pipeline = None
        gc.collect()  # errors leave cycles that hold pipelines; a process forked later that collected one would wait for its threads forever
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
            return read.encoded, read.request.flips.astype(np.int32)

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
        device_id = torch.cuda.current_device() if gpu and self._device.index is None else self._device.index if gpu else None
        return _face_pipeline(
            feed or (lambda: self._feed()), "mixed" if gpu else "cpu",
            batch_size=batch_size or self._sampler.global_batch_size // self._sampler.world_size, num_threads=self._num_threads,
            device_id=device_id, prefetch_queue_depth=self._prefetch, exec_dynamic=True)

    def _read(self, request):
        images = [self.broken.load(i, self._load) for i in request.indices.tolist()]
        return _Read(request, np.array([i for i, _ in images], dtype=np.int64), [encoded for _, encoded in images])

    def _load(self, i):
        return load_encoded(self._source, i, convert=i in self._converted)

    def _blame(self, decoding):
        """Find the images that DALI cannot decode among those under way. Whether there were any.

        Raises:
            ValueError: one is broken and broken images are not to be replaced.
        """
        under_way = [(i, encoded) for read in decoding for i, encoded in zip(read.shown.tolist(), read.encoded)]
        found = {}
        for (i, _), error in zip(under_way, self._readers.map(lambda image: _error_of(load_face, self._source, image[0]), under_way)):
            if error is not None:
                found[i] = str(error)
        if found:
            if not self.broken.replaces:
                raise ValueError(next(iter(found.values())))
            self.broken.add(found)
            return True
        refused = {i for i, encoded in under_way if not self._decodes(encoded)}
        self._converted |= refused
        return bool(refused)

    def _decodes(self, encoded):
        """Whether DALI can decode an image, tried on its own."""
        try:
            self._build(1, lambda: ([encoded], np.zeros(1, dtype=np.int32))).run()
        except RuntimeError:
            return False
        return True

    def _rewind(self):
        """Take out what was decoded ahead for an iteration left half way, and make the pipeline ready for the next one."""
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
