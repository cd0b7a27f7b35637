"""What happens when DALI gives up an image, or everything, as on a device without memory."""

import io
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from scf_fast.pipelines import waiting
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Request
from scf_fast.pipelines.loading.decode import decode_face
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import EncodedImages
from scf_fast.pipelines.waiting import TimedOut

pytest.importorskip("nvidia.dali")
from scf_fast.pipelines.loading import dali

_MOST_PIPELINES = 60


def encode(shade, fmt="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (112, 112), (shade, 255 - shade, 0)).save(file, fmt)
    return file.getvalue()


def bad_checksum(image):
    """Pillow does not mind a PNG's wrong last checksum, DALI does."""
    end = len(image) - 13
    return image[:end] + bytes([image[end] ^ 255]) + image[end + 1 :]


def make_source(count, refused=(), broken=()):
    images = [encode(i) for i in range(count)]
    for i in refused:
        images[i] = bad_checksum(images[i])
    for i in broken:
        images[i] = b"no image"
    return EncodedImages(images, labels=np.arange(count))


@pytest.fixture
def built(monkeypatch):
    """Lists weak references to the pipelines that are built; too many end the test, which else would not end."""
    pipelines = []

    def build(*arguments, make=dali._face_pipeline, **options):
        assert len(pipelines) < _MOST_PIPELINES, "the loader tries for ever"
        pipeline = make(*arguments, **options)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali, "_face_pipeline", build)
    return pipelines


def loader_of(source, batch_size, on_broken="replace", prefetch=2):
    sampler = EpochSampler(len(source), batch_size, shuffle=False)
    return make_loader(source, sampler, backend="dali", num_workers=1, on_broken=on_broken, prefetch=prefetch)


@pytest.mark.parametrize("on_broken", ["replace", "raise"])
@pytest.mark.parametrize("fewest", [1, 3])
def test_failure_that_no_image_caused_ends_with_dalis_message(built, monkeypatch, on_broken, fewest):
    """Memory for no image at all, and memory for two images, but not for a batch."""

    def run(pipeline, *arguments, run=dali.Pipeline.run):
        if pipeline.max_batch_size >= fewest:
            raise RuntimeError(
                "Critical error in pipeline:\nError in GPU operator\n\nencountered:\n\nCUDA out of memory"
            )
        return run(pipeline, *arguments)

    monkeypatch.setattr(dali.Pipeline, "run", run)
    with (
        loader_of(make_source(16), 4, on_broken) as loader,
        pytest.raises(ValueError, match=r"no image is at fault: .*CUDA out of memory; .*backend='torch'") as error,
    ):
        list(loader.batches(0))
    assert "\n" not in str(error.value) and not loader.broken.found and not loader._converted


def test_memory_that_ends_while_images_are_searched_ends_the_run(built, monkeypatch):
    """The probe passes, and then everything is refused, pixels too."""

    def run(pipeline, *arguments, run=dali.Pipeline.run):
        if len(built) != 2:
            raise RuntimeError("CUDA out of memory")
        return run(pipeline, *arguments)

    monkeypatch.setattr(dali.Pipeline, "run", run)
    with (
        loader_of(make_source(4), 4, prefetch=1) as loader,
        pytest.raises(ValueError, match="no image is at fault: CUDA out of memory"),
    ):
        list(loader.batches(0))


@pytest.mark.parametrize("on_broken", ["replace", "raise"])
def test_refused_image_is_found_by_bisection(built, caplog, on_broken):
    source = make_source(192, refused=[70])
    with loader_of(source, 64, on_broken) as loader:
        batches = list(loader.batches(0))
        assert loader._converted == {70} and not loader.broken.found
    # Two to load with, the probe, each batch whole, and two for each halving of 64 images.
    assert len(built) <= 2 + 1 + 3 + 2 * 6
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(192))
    face = batches[1].images[6].permute(1, 2, 0) * 127.5 + 127.5
    flip = EpochSampler(192, 64, shuffle=False).flips(0, np.array([70]))[0]
    assert np.abs(face.numpy() - decode_face(source.encoded(70))[:, :: -1 if flip else 1]).max() < 1e-3
    assert [record.message for record in caplog.records] == [
        "DALI refuses an image that Pillow decodes, and gets its pixels: image 70"
    ]


def test_pipeline_that_failed_gives_its_memory_back_before_another_is_built(built, monkeypatch):
    alive = []
    build = dali.DaliLoader._build

    def noted(loader, *arguments, **options):
        alive.append(sum(pipeline() is not None for pipeline in built))
        return build(loader, *arguments, **options)

    monkeypatch.setattr(dali.DaliLoader, "_build", noted)
    with loader_of(make_source(8, refused=[5]), 4) as loader:
        assert len(list(loader.batches(0))) == 2
    assert len(alive) > 3 and not any(alive)


def test_broken_image_behind_a_refused_one_keeps_its_turn(built):
    """Its batch was read while DALI gave up an earlier one, which is then decoded again."""
    shown = []
    with (
        loader_of(make_source(16, refused=[5], broken=[9]), 4, "raise", prefetch=3) as loader,
        pytest.raises(ValueError, match="image 9 cannot be decoded"),
    ):
        for batch in loader.batches(0):
            shown += batch.indices.tolist()
    assert shown == list(range(8))


def test_batches_are_bound_to_the_stream_that_asks_for_them(monkeypatch):
    """Not to that of the first batch: DALI gives memory to the next batch in the order of the stream it was told."""
    bound, streams = [], iter("abcd")

    class Gpu:
        """Stands in for a pipeline on a GPU; outputs are arrays."""

        def __init__(self, feed, *rest, **options):
            self.feed = feed

        def run(self, stream):
            bound.append(stream)
            encoded, *_ = self.feed()
            return (type("Batch", (), {"as_tensor": lambda batch: np.zeros((len(encoded), 112, 112, 3), np.uint8)})(),)

    monkeypatch.setattr(dali, "_face_pipeline", Gpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: next(streams))
    loader = make_loader(make_source(8), EpochSampler(8, 4), device="cuda:0", backend="dali", num_workers=1)
    requests = iter([Request(np.arange(at, at + 4), np.zeros(4, dtype=bool)) for at in (0, 4)])
    with loader:
        assert len(list(loader._decode(requests))) == 2
    assert bound == ["a", "b", "c"]


def test_error_of_a_source_is_not_taken_for_dalis(built):
    class Fails(EncodedImages):
        def read(self, indices):
            if 9 in indices:
                raise RuntimeError("a bug in the source")
            return super().read(indices)

    source = Fails([encode(i) for i in range(16)], labels=np.arange(16))
    with loader_of(source, 4) as loader, pytest.raises(RuntimeError, match=r"^a bug in the source$"):
        list(loader.batches(0))
    assert len(built) == 1


class Slow(EncodedImages):
    """Waits before each file is read."""

    def __init__(self, count, seconds):
        super().__init__([encode(i) for i in range(count)], labels=np.arange(count))
        self._seconds = seconds

    def encoded(self, i):
        time.sleep(self._seconds(i))
        return super().encoded(i)


def test_a_reader_that_hangs_is_named(monkeypatch):
    monkeypatch.setattr(waiting, "_JOIN", 0.1)
    source = Slow(12, lambda i: 4 if i == 5 else 0)
    sampler = EpochSampler(12, 4, shuffle=False)
    expected = (
        "the DALI loader has waited . s for a thread that reads 4 images for DALI's pipeline, the first .* image 4,"
    )
    with make_loader(source, sampler, backend="dali", num_workers=1, prefetch=1, timeout=0.5) as loader:
        with pytest.raises(TimedOut, match=f"^{expected}"):
            list(loader.batches(0))


def test_a_pipeline_that_hangs_is_named(monkeypatch):
    monkeypatch.setattr(waiting, "_JOIN", 0.1)
    monkeypatch.setattr(dali.Pipeline, "run", lambda *_: time.sleep(3))
    sampler = EpochSampler(8, 4, shuffle=False)
    with make_loader(make_source(8), sampler, backend="dali", num_workers=1, timeout=0.3) as loader:
        with pytest.raises(TimedOut, match="for DALI's pipeline, which decodes on cpu, and there was no progress"):
            list(loader.batches(0))


def test_readers_that_are_slow_are_waited_for(monkeypatch):
    """A batch takes three times the limit, no part of it takes half."""
    monkeypatch.setattr(dali, "_READ_TOGETHER", 2)
    sampler = EpochSampler(12, 12, shuffle=False)
    source = Slow(12, lambda i: 0.1)
    with make_loader(source, sampler, backend="dali", num_workers=1, prefetch=1, timeout=0.4) as loader:
        assert [batch.indices.tolist() for batch in loader.batches(0)] == [list(range(12))]
