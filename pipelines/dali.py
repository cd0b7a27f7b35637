"""The loader on NVIDIA DALI: reader threads hand encoded images to a pipeline that decodes, resizes and flips them, on the GPU
where there is one.

DALI's own readers know nothing of the sampler's order, so the images come in through an external source. The pipeline ends in
uint8: the conversion to the training dtype copies anyway, so it frees DALI's buffer for reuse and costs no copy of its own.
"""
import contextlib
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.images import FACE_SIZE, decode_faces
from pipelines.loader import Loader


@pipeline_def(enable_conditionals=True)
def _face_pipeline(feed, decoder_device):
    """(B, 112, 112, 3) uint8 from encoded images and flips, as pipelines.images.decode_face defines it."""
    encoded, flips = fn.external_source(feed, num_outputs=2, batch=True)
    faces = fn.decoders.image(encoded, device=decoder_device, output_type=types.RGB, jpeg_fancy_upsampling=True)
    shape = fn.peek_image_shape(encoded)
    if (shape[0] != FACE_SIZE) or (shape[1] != FACE_SIZE):  # resizing faces that have the size already would halve the speed
        faces = fn.resize(faces, size=[FACE_SIZE, FACE_SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(faces, horizontal=flips)


class DaliLoader(Loader):
    """See pipelines.loader.make_loader. The pipeline is built with the first batch and lives until close()."""

    backend = "dali"

    def __init__(self, source, sampler, preprocessing, device, dtype, num_workers, prefetch):
        super().__init__(source, sampler, preprocessing, device, dtype)
        self._num_threads, self._prefetch = max(1, num_workers), prefetch
        self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="face-reader")
        self._pipeline = None
        self._feed = None

    def close(self):
        super().close()
        self._pipeline = None
        self._readers.shutdown()

    def _faces(self, requests):
        self._rewind()
        if self._pipeline is None:
            self._pipeline = self._build()
        reading, decoding = deque(), deque()
        reads = (self._readers.submit(self._read, *request) for request in requests)

        def feed():
            reading.extend(itertools.islice(reads, self._prefetch + 1 - len(reading)))
            if not reading:
                raise StopIteration
            encoded, flips, indices = reading.popleft().result()
            decoding.append(indices)
            return encoded, flips

        self._feed = feed
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            with contextlib.suppress(StopIteration):
                while True:
                    (faces,) = self._pipeline.run(stream)  # bound to this stream, so its buffer is freed in its order
                    decoding.popleft()
                    yield torch.from_dlpack(faces.as_tensor())
        except Exception as error:
            self._pipeline = None  # its state is undefined now
            if isinstance(error, RuntimeError):  # DALI does not say which image it could not decode: the first that Pillow cannot
                for indices in decoding:
                    decode_faces(self._source, indices, np.zeros(len(indices), dtype=bool))
            raise
        finally:
            for read in reading:
                read.cancel()

    def _build(self):
        gpu = self._device.type == "cuda"
        device_id = torch.cuda.current_device() if gpu and self._device.index is None else self._device.index if gpu else None
        return _face_pipeline(
            lambda: self._feed(), "mixed" if gpu else "cpu", batch_size=self._sampler.global_batch_size // self._sampler.world_size,
            num_threads=self._num_threads, device_id=device_id, prefetch_queue_depth=self._prefetch, exec_dynamic=True)

    def _read(self, indices, flips):
        """What one run of the pipeline is fed, and the indices. Copies, so that the disk is waited for here and not in the feed."""
        return [np.array(self._source.encoded(i)) for i in indices.tolist()], flips.astype(np.int32), indices

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


def _exhausted():
    raise StopIteration
