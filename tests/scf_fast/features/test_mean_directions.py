"""Class centers from images: the mean directions, with a cache and without."""

import numpy as np
import pytest
import torch

from scf_fast.features.mean_directions import (
    BothOrientations,
    batches_with_positions,
    normalize_sums,
    sum_directions,
)
from scf_fast.features.records import CacheLayout
from scf_fast.features.store import CacheKey, FeatureCache
from scf_fast.features.stream import FeatureStream
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.frozen import FrozenBackbone
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sources.base import EncodedImages

CPU = torch.device("cpu")
KEY = CacheKey("b", "d", "insightface", "fp32")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    network = Backbone("ir_tiny", 16).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return network


@pytest.fixture(scope="module")
def few(faces):
    """The first pictures of three identities, one of them broken."""
    good = open_source(faces / "train")
    chosen = [i for label in range(3) for i in np.flatnonzero(good.labels == label)[: 7 - label]]
    images = [bytes(good.encoded(i)) for i in chosen]
    images[4] = images[4][:200]
    return EncodedImages(images, good.labels[chosen])


@pytest.mark.parametrize("cached, orientations", [(False, 2), (True, 2), (False, 1)])
def test_equal_to_a_plain_loop_without_what_is_broken(cached, orientations, backbone, few, tmp_path, plain_centers):
    layout, cache = CacheLayout(len(few), 16, (16, 7, 7), "bf16"), None
    if cached:
        FeatureCache.create_or_check(tmp_path, KEY, layout)
        cache = FeatureCache.open(tmp_path, layout, 0)
    sampler = BothOrientations(len(few), 5)

    def images(sampler, flip):
        return make_loader(
            few, sampler, Preprocessing(horizontal_flip=flip), backend="torch", num_workers=0, on_broken="replace"
        )

    shown = []
    with FeatureStream(
        images, sampler, few.labels, FrozenBackbone(backbone, "cpu", ("fp32",)), flip=True, device=CPU, cache=cache
    ) as stream:
        batches = batches_with_positions(stream, sampler, orientations, shown.append)
        sums, counts = sum_directions(batches, 3, 16, CPU)
    assert sums.dtype == torch.float64 and counts.tolist() == [6 * orientations, 6 * orientations, 5 * orientations]
    assert sum(shown) == orientations * len(few)
    expected = plain_centers(backbone, few, "insightface", orientations, left_out=[4])
    np.testing.assert_allclose(normalize_sums(sums, counts), expected, atol=2e-6)
    other = plain_centers(backbone, few, "insightface", 3 - orientations, left_out=[4])
    assert np.abs(other - expected).max() > 1e-4  # so the mirror images were told apart


def test_identities_without_images_and_useless_features_are_named():
    sums = torch.ones(9, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"7 of 9 \(0, 1, 2, 3, 4, \.\.\.\) have none"):
        normalize_sums(sums, torch.tensor([0] * 7 + [1, 2]))
    sums[2], sums[5, 1] = 0, torch.nan
    with pytest.raises(ValueError, match=r"those of 2 of 9 \(2, 5\) are not so"):
        normalize_sums(sums, torch.ones(9, dtype=torch.int64))
