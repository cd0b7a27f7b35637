"""The stream gives the same features from images and from the cache."""
import contextlib

import numpy as np
import pytest
import torch

from pipelines.index import open_source
from pipelines.loader import Preprocessing, make_loader
from pipelines.sampler import EpochSampler
from pipelines.sources import EncodedImages
from scf_fast.backbones import Backbone
from scf_fast.feature_cache import CacheLayout, FeatureCache
from scf_fast.features import FeatureStream
from scf_fast.frozen import FrozenBackbone

CPU = torch.device("cpu")
KEY = {"backbone": "b", "data": "d", "normalization": "insightface", "precision": "fp32"}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return FrozenBackbone(Backbone("ir_small", 16), "cpu", ("fp32",))


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
        assert torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.features, b.features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.convf, b.convf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [128, 40])
def test_cached_epochs_equal_uncached_ones(rows, faces, backbone, tmp_path):
    """With room for all 128 images, and with a budget of 40."""
    layout = CacheLayout(rows, 16, (128, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)
    plain, _ = stream(faces, backbone)
    with plain, contextlib.closing(stream(faces, backbone, FeatureCache.open(tmp_path / "c", layout, 0))[0]) as cached:
        decoded = []
        for epoch in range(3):
            before = cached._make_images.decoded
            assert_same(list(cached.batches(epoch)), list(plain.batches(epoch)))
            decoded.append(cached._make_images.decoded - before)
    assert decoded[0] == 128 and all(count == 128 - rows for count in decoded[1:]) if rows == 128 else decoded[0] == 128 and decoded[1] < 128


def test_resume_in_the_middle_and_partly_filled_cache(faces, backbone, tmp_path):
    layout = CacheLayout(128, 16, (128, 7, 7), "fp32")
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
    layout = CacheLayout(128, 16, (128, 7, 7), "fp32")
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


def test_a_broken_image_is_replaced_label_and_all_and_never_cached(faces, backbone, tmp_path):
    good = open_source(faces / "train")
    images = [bytes(good.encoded(i)) for i in range(40)]
    images[7] = images[7][:200]
    source = EncodedImages(images, good.labels[:40])
    layout = CacheLayout(40, 16, (128, 7, 7), "fp32")
    FeatureCache.create_or_check(tmp_path / "c", KEY, layout)

    def make(sampler, flip):
        return make_loader(source, sampler, Preprocessing(horizontal_flip=flip), backend="torch", num_workers=0, on_broken="replace")

    def over(cache):
        return FeatureStream(make, EpochSampler(40, 8, seed=1), source.labels, backbone, flip=True, device=CPU, cache=cache)

    with over(None) as plain, over(FeatureCache.open(tmp_path / "c", layout, 0)) as cached:
        for epoch in range(2):
            assert_same(list(cached.batches(epoch)), list(plain.batches(epoch)))
            assert len(plain.broken) == len(cached.broken) == 1
    assert np.flatnonzero(np.fromfile(tmp_path / "c" / "checksums.bin", np.uint32) == 0).tolist() == [7]
