"""The stream gives the same features from images and from the cache."""

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from scf_fast.config import ConfidenceConfig
from scf_fast.distributed import Runtime
from scf_fast.features.open import open_stream
from scf_fast.features.records import CacheLayout
from scf_fast.features.store import CacheKey, FeatureCache
from scf_fast.features.stream import FeatureStream, one_ahead
from scf_fast.networks import frozen
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import ConvConfidence
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.objectives import Objective
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sources.base import EncodedImages
from scf_fast.pipelines.waiting import TimedOut
from scf_fast.stages.confidence import ConfidenceStage
from scf_fast.stages.criteria import make_criterion

CPU = torch.device("cpu")
KEY = CacheKey("b", "d", "insightface", "fp32")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return FrozenBackbone(Backbone("ir_tiny", 16), "cpu", ("fp32",))


class Images:
    """Makes loaders and counts the images that they decoded."""

    def __init__(self, source):
        self.source, self.decoded = source, 0

    @contextlib.contextmanager
    def _closing(self, loader):
        yield loader
        loader.close()

    def __call__(self, sampler, flip):
        loader = make_loader(self.source, sampler, Preprocessing(horizontal_flip=flip), backend="torch", num_workers=0)
        batches = loader.batches

        def counted(*arguments):
            for batch in batches(*arguments):
                self.decoded += len(batch.labels)
                yield batch

        loader.batches = counted
        return loader


def stream(faces, backbone, cache=None, rank=0, world_size=1):
    source = open_source(faces / "train")
    sampler = EpochSampler(len(source), 32, rank=rank, world_size=world_size, seed=1)
    images = Images(source)
    return FeatureStream(images, sampler, source.labels, backbone, flip=True, device=CPU, cache=cache), images


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.features, b.features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.convf, b.convf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [128, 40])
def test_cached_epochs_equal_uncached_ones(rows, faces, backbone, tmp_path):
    """With room for all 128 images, and with a budget of 40."""
    layout = CacheLayout(rows, 16, (16, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
    plain, _ = stream(faces, backbone)
    with plain, contextlib.closing(stream(faces, backbone, FeatureCache.open(tmp_path / "c", layout, 0))[0]) as cached:
        decoded = []
        for epoch in range(3):
            before = cached._make_images.decoded
            assert_same(list(cached.batches(epoch)), list(plain.batches(epoch)))
            decoded.append(cached._make_images.decoded - before)
    assert (
        decoded[0] == 128 and all(count == 128 - rows for count in decoded[1:])
        if rows == 128
        else decoded[0] == 128 and decoded[1] < 128
    )


def test_resume_in_the_middle_and_partly_filled_cache(faces, backbone, tmp_path):
    layout = CacheLayout(128, 16, (16, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
    plain, _ = stream(faces, backbone)
    first, _ = stream(faces, backbone, FeatureCache.open(tmp_path / "c", layout, 0))
    batches = first.batches(0)
    next(batches)
    next(batches)
    batches.close()  # stopped after two of four batches
    first.close()
    second, images = stream(faces, backbone, FeatureCache.open(tmp_path / "c", layout, 0))
    with plain, second:
        assert_same(list(second.batches(1, 1)), list(plain.batches(1, 1)))
        assert images.decoded < 96
        assert_same(list(second.batches(0, 2)), list(plain.batches(0, 2)))


def test_ranks_fill_one_cache_together(faces, backbone, tmp_path):
    layout = CacheLayout(128, 16, (16, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
    streams = [stream(faces, backbone, FeatureCache.open(tmp_path / "c", layout, rank), rank, 2) for rank in range(2)]
    for s, _ in streams:
        list(s.batches(0))
    for s, images in streams:
        before = images.decoded
        labels = torch.cat([batch.labels for batch in s.batches(1)])
        assert images.decoded == before and len(labels) == 64
        s.close()
    assert np.fromfile(tmp_path / "c" / "checksums.bin", np.uint32).all()


@pytest.mark.parametrize("cached", [False, True])
def test_a_rank_may_have_no_image_of_the_last_batch(cached, faces, backbone, tmp_path):
    good = open_source(faces / "train")
    source = EncodedImages([bytes(good.encoded(i)) for i in range(9)], good.labels[:9])
    layout = CacheLayout(9, 16, (16, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
    shares = []
    for rank in range(2):
        sampler = EpochSampler(9, 8, rank=rank, world_size=2, shuffle=False, last_batch="partial")
        cache = FeatureCache.open(tmp_path / "c", layout, rank) if cached else None
        with FeatureStream(
            Images(source), sampler, source.labels, backbone, flip=True, device=CPU, cache=cache
        ) as made:
            shares += [[len(tensor) for tensor in batch] for epoch in range(2) for batch in made.batches(epoch)]
    assert sorted(shares) == [[0] * 4] * 2 + [[1] * 4] * 2 + [[4] * 4] * 4


def test_a_broken_image_is_replaced_label_and_all_and_never_cached(faces, backbone, tmp_path):
    good = open_source(faces / "train")
    images = [bytes(good.encoded(i)) for i in range(40)]
    images[7] = images[7][:200]
    source = EncodedImages(images, good.labels[:40])
    layout = CacheLayout(40, 16, (16, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)

    def make(sampler, flip):
        return make_loader(
            source, sampler, Preprocessing(horizontal_flip=flip), backend="torch", num_workers=0, on_broken="replace"
        )

    def over(cache):
        return FeatureStream(
            make, EpochSampler(40, 8, seed=1), source.labels, backbone, flip=True, device=CPU, cache=cache
        )

    with over(None) as plain, over(FeatureCache.open(tmp_path / "c", layout, 0)) as cached:
        for epoch in range(2):
            assert_same(list(cached.batches(epoch)), list(plain.batches(epoch)))
            assert plain.count_broken() == cached.count_broken() == 1
    assert np.flatnonzero(np.fromfile(tmp_path / "c" / "checksums.bin", np.uint32) == 0).tolist() == [14, 15]


def test_next_batch_is_launched_first_and_each_is_waited_for(monkeypatch):
    """The order of what reaches the device, with stand-ins for CUDA's streams and events."""
    log = []

    class Stream:
        device = None

        def __init__(self, name="making"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

        def record_event(self):
            return log[-1]

    class OnDevice:
        is_cuda = True

        def __init__(self, name):
            self.name = name

        def record_stream(self, stream):
            log.append(f"{self.name} kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def batches():
        for name in "ab":
            log.append(f"make {name}")
            yield (OnDevice(name), torch.zeros(1))

    for batch in one_ahead(batches(), Stream()):
        log.append(f"train {batch[0].name}")
    assert log == [
        "making waits for training",
        "make a",
        "make b",
        "training waits for make a",
        "a kept for training",
        "train a",
        "training waits for make b",
        "b kept for training",
        "train b",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cached", [False, True])
def test_overlapped_batches_are_those_of_the_cpu(cached, faces, backbone, tmp_path):
    """Compiled as one graph whose outputs the next run overwrites, and read late, while the stream works on the next
    batch.
    """
    torch.manual_seed(0)
    device, source, cache = torch.device("cuda"), open_source(faces / "train"), None
    if cached:
        layout = CacheLayout(128, 16, (16, 7, 7), "fp32")
        FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
        cache = FeatureCache.open(tmp_path / "c", layout, 0)

    def images(sampler, flip):
        return make_loader(
            source, sampler, Preprocessing(horizontal_flip=flip), device=device, backend="torch", num_workers=0
        )

    network = FrozenBackbone(Backbone("ir_tiny", 16), device, ("fp32",), compile=True)
    plain, _ = stream(faces, backbone)
    with (
        plain,
        FeatureStream(
            images, EpochSampler(len(source), 32, seed=1), source.labels, network, flip=True, device=device, cache=cache
        ) as made,
    ):
        for epoch in range(2):
            got = []
            for batch in made.batches(epoch):
                torch.cuda._sleep(10_000_000)  # the training's stream is behind
                got.append(type(batch)(*(value + 0 for value in batch)))
            assert_same([type(batch)(*(value.cpu() for value in batch)) for batch in got], list(plain.batches(epoch)))


class NoHostSync(TorchDispatchMode):
    """Fails on operators that make the host wait for values of the device: reading one, and indexing by a mask, whose
    size is a value.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
            "aten::masked_select",
        ), name
        masks = (
            [index for index in args[1] if index is not None and index.dtype == torch.bool]
            if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list | tuple)
            else []
        )
        assert not masks, f"{name} by a mask"
        return function(*args, **(kwargs or {}))


def decoded_outside(make_images):
    """The same loaders; decoding, which is on the host, is not watched."""

    def make(sampler, flip):
        loader = make_images(sampler, flip)
        batches = loader.batches

        def ahead(*arguments):
            with _disable_current_modes():
                return (batch for batch in list(batches(*arguments)))

        loader.batches = ahead
        return loader

    return make


def test_the_watch_for_host_synchronization_sees_one():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="by a mask"), NoHostSync():
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("rows", [None, 40])
def test_a_step_never_waits_for_the_device(rows, faces, backbone, tmp_path):
    """Features from images and from a cache that is filled meanwhile, confidence net, loss, backward pass."""
    cache = None
    if rows:
        layout = CacheLayout(rows, 16, (16, 7, 7), "int8")
        FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
        cache = FeatureCache.open(tmp_path / "c", layout, 0)
    backbone(torch.zeros(2, 3, 112, 112))  # the choice of the precision waits, once
    stage = object.__new__(ConfidenceStage)
    stage.config = ConfidenceConfig(data="-", output_dir="-", saved_bkb="-", saved_fc="-")
    stage._net_dtype, net = torch.float32, ConvConfidence(16, 7)
    stage._criteria = {"scf": make_criterion(Objective.SCF, stage.config, 16, torch.randn(8, 16))}
    made, _ = stream(faces, backbone, cache)
    made._make_images = decoded_outside(made._make_images)
    with made:
        for epoch in range(2):
            batches = made.batches(epoch)
            with NoHostSync():
                for batch in batches:
                    result = stage.loss(net, batch)
                    result.loss.backward()
        assert result.loss.isfinite() and result.metrics["kappa"] > 0
        assert made.seconds["data"] > 0 and made.seconds["backbone"] > 0


def test_a_cache_goes_on_in_its_own_precision_unless_another_was_asked_for(faces, tmp_path, monkeypatch):
    source = open_source(faces / "train")
    state = Backbone("ir_tiny", 16).state_dict()

    def opened(precision):
        config = ConfidenceConfig(
            data="-",
            output_dir="-",
            saved_bkb="-",
            saved_fc="-",
            feature_cache=str(tmp_path / "c"),
            precision=precision,
            normalization="published",
            loader="torch",
            num_workers=1,
        )
        return open_stream(config, state, source, EpochSampler(len(source), 32), Runtime(0, 1, CPU))

    with opened("fp32") as made:
        next(made.batches(0))
    meta = tmp_path / "c" / "meta.json"
    assert (
        json.loads(meta.read_text())["key"]["precision"] == "fp32"
        and 0 < json.loads(meta.read_text())["convf_error"] < 2.0**-8
    )
    meta.write_text(meta.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    monkeypatch.setattr("scf_fast.networks.frozen.MIN_COSINE", 0.9)
    monkeypatch.setitem(frozen.MAX_CONVF_ERROR, "bf16", 0.1)
    with opened("auto") as made:
        next(made.batches(1))  # other images than the first batch of epoch 0
        assert made._backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="precision: cached bf16, needed fp32"):
        opened("fp32")


def test_a_cache_that_hangs_is_named(faces, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("scf_fast.pipelines.waiting._JOIN", 0.1)
    source = open_source(faces / "train")
    layout = CacheLayout(len(source), 16, (64, 7, 7), "fp16")
    FeatureCache.create_or_check(tmp_path, KEY, layout)
    cache, hang = FeatureCache.open(tmp_path, layout, 0), threading.Event()
    cache._checksums[:] = 1
    monkeypatch.setattr(cache, "read", lambda *_, **__: hang.wait())
    sampler = EpochSampler(len(source), 32, seed=1)
    made = FeatureStream(None, sampler, source.labels, backbone, flip=True, device=CPU, cache=cache, timeout=0.3)
    with pytest.raises(
        TimedOut, match=f"^stage 2 has waited 0 s for the reader of batch 0 of the feature cache {tmp_path}"
    ):
        next(made.batches(0))
    hang.set()
    made.close()
