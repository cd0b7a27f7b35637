"""Class centers from images: the mean directions, by any number of ranks, with a cache and without, and stage 2 on
them.
"""

import copy
import sys

import numpy as np
import pytest
import torch

from scf_fast import centers_from_data
from scf_fast.distributed import free_port
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
from scf_fast.pipelines.loading.decode import decode_face
from scf_fast.pipelines.sources.base import EncodedImages
from scf_fast.weights.contents import Facts
from scf_fast.weights.reading import read_weights

CPU = torch.device("cpu")
KEY = CacheKey("b", "d", "insightface", "fp32")


def plain_centers(backbone, source, normalization, orientations=2, left_out=()):
    """(C, D) float64 in float64 arithmetic, one image after another."""
    network, total = copy.deepcopy(backbone).double().eval(), np.zeros((source.num_classes, backbone.z_dim))
    scale = {"insightface": 127.5, "published": 128.0}[normalization]
    for i in set(range(len(source))) - set(left_out):
        face = torch.from_numpy((decode_face(source.encoded(i)) - 127.5) / scale).permute(2, 0, 1)
        for image in (face, face.flip(2))[:orientations]:
            with torch.no_grad():
                feature = network(image[None])[0][0].numpy()
            total[source.labels[i]] += feature / np.linalg.norm(feature)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


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
def test_equal_to_a_plain_loop_without_what_is_broken(cached, orientations, backbone, few, tmp_path):
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


def test_two_ranks_equal_a_plain_loop_and_stage_2_trains_on_it(faces, stage1, tmp_path, flags, run_command):
    """The pixels are those that stage 1 notes beside its backbone; they are noted anew, and stage 2 takes them and the
    filled cache.
    """
    weights, out, cache = stage1[0] / "backbone.pth", tmp_path / "made" / "fc.pth", tmp_path / "cache"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        free_port(),
        "-m",
    ]
    status, output = run_command(
        [
            *launcher,
            "scf_fast.centers_from_data",
            "--data",
            faces / "train",
            "--saved_bkb",
            weights,
            "--output",
            out,
            "--precision",
            "fp32",
            "--batch_size",
            48,
            "--feature_cache",
            cache,
            "--num_workers",
            1,
        ]
    )
    assert (
        status == 0 and output.count("class centers of 8 identities; mean cosine of an image with its center 0.") == 1
    ), output
    found = read_weights(out)
    assert found.facts == Facts(normalization="published")
    network = Backbone(*read_weights(weights).network())
    network.load_state_dict(read_weights(weights).require_backbone())
    expected = plain_centers(network, open_source(faces / "train"), "published")
    np.testing.assert_allclose(found.require_class_centers(), expected, atol=1e-5)
    status, output = run_command(
        [
            sys.executable,
            "train.py",
            *flags["stage2"],
            "--saved_bkb",
            weights,
            "--saved_fc",
            out,
            "--data",
            faces / "train",
            "--feature_cache",
            cache,
            "--output_dir",
            tmp_path / "run",
            "--max_steps",
            2,
        ]
    )
    assert status == 0 and "pixels: published, as noted in --saved_fc" in output and "frozen backbone" not in output, (
        output
    )


def test_identities_without_images_and_useless_features_are_named():
    sums = torch.ones(9, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"7 of 9 \(0, 1, 2, 3, 4, \.\.\.\) have none"):
        normalize_sums(sums, torch.tensor([0] * 7 + [1, 2]))
    sums[2], sums[5, 1] = 0, torch.nan
    with pytest.raises(ValueError, match=r"those of 2 of 9 \(2, 5\) are not so"):
        normalize_sums(sums, torch.ones(9, dtype=torch.int64))


def test_command_refuses_in_one_line(backbone, few, tmp_path, capsys):
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    (tmp_path / "here.pth").touch()
    for number, label in enumerate((0, 2)):  # nobody has the number 1
        (tmp_path / f"{number}.jpg").write_bytes(few.encoded(number).tobytes())
        with open(tmp_path / "list.txt", "a") as file:
            file.write(f"{number}.jpg {label}\n")
    for output, message in (
        ("here.pth", "exists; give another name, or --overwrite"),
        ("fc.pth", "1 of 3 (1) have none"),
    ):
        arguments = [
            "--data",
            tmp_path / "list.txt",
            "--saved_bkb",
            tmp_path / "backbone.pth",
            "--output",
            tmp_path / output,
        ]
        assert centers_from_data.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "fc.pth").exists()
