"""The commands that compute features without training, on two ranks, and stage 2 on what they leave behind.

The pixels are normalized as stage 1 notes beside its backbone, so that training finds the cache that was built for it.
"""

import shutil

import numpy as np
import pytest

from scf_fast import feature_cache
from scf_fast.features.store import count_present, read_meta
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.index import open_source
from scf_fast.weights.contents import Facts
from scf_fast.weights.reading import read_weights


@pytest.fixture(scope="module")
def on_two_ranks(faces, stage1, fork_ranks):
    """``on_two_ranks(module, *arguments)``: runs a command on the data and the backbone of stage 1; its output."""

    def launch(module, *arguments):
        inputs = ["--data", faces / "train", "--saved_bkb", stage1[0] / "backbone.pth", "--num_workers", 1]
        status, output = fork_ranks(2, *arguments, *inputs, "--precision", "fp32", module=module)
        assert status == 0, output
        return output

    return launch


@pytest.fixture(scope="module")
def cache(on_two_ranks, tmp_path_factory):
    """A feature cache built in advance."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    output = on_two_ranks("scf_fast.feature_cache", "build", folder, "--cache_dtype", "int8")
    assert output.count("pixels: published, as noted with --saved_bkb") == 1, output
    return folder


@pytest.fixture(scope="module")
def centers(on_two_ranks, tmp_path_factory):
    """Class centers from the images, in ``fc.pth`` beside the cache that was filled meanwhile."""
    folder = tmp_path_factory.mktemp("centers") / "made"
    arguments = ["--output", folder / "fc.pth", "--feature_cache", folder / "cache", "--batch_size", 48]
    output = on_two_ranks("scf_fast.centers_from_data", *arguments)
    assert output.count("class centers of 8 identities; mean cosine of an image with its center 0.") == 1, output
    return folder


def test_the_built_cache_is_whole(cache, capsys):
    def command(*words, status=0):
        assert feature_cache.main(list(map(str, words))) == status
        return capsys.readouterr().out

    shown = command("info", cache)
    assert "128 of 128 (100.0 %), both orientations" in shown and "convf 16x7x7 int8" in shown
    assert "precision  fp32" in shown
    assert 1e-4 < float(shown.split("difference ")[1].split()[0]) < 2e-2
    assert command("verify", cache).startswith("128 intact records, 0 damaged")


def test_class_centers_equal_a_plain_loop_and_fill_the_same_cache(cache, centers, faces, stage1, plain_centers):
    found, weights = read_weights(centers / "fc.pth"), read_weights(stage1[0] / "backbone.pth")
    assert found.facts == Facts(normalization="published")  # noted for stage 2 again
    network = Backbone(*weights.network())
    network.load_state_dict(weights.require_backbone())
    expected = plain_centers(network, open_source(faces / "train"), "published")
    np.testing.assert_allclose(found.require_class_centers(), expected, atol=1e-5)
    assert read_meta(centers / "cache").key == read_meta(cache).key and count_present(centers / "cache") == 128


def test_stage_2_with_another_head_rate_radius_and_normalizer_computes_no_features(
    cache, centers, faces, stage1, tmp_path, flags, fork_ranks
):
    head = ["--confidence_net", "mlp", "--lr", "1e-4", "--radius", 32, "--normalizer", "published"]
    inputs = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", centers / "fc.pth", "--data", faces / "train"]
    cached = ["--feature_cache", cache, "--cache_dtype", "int8", "--precision", "auto"]
    more = ["--output_dir", tmp_path / "run", "--max_steps", 2]
    status, output = fork_ranks(0, *flags["stage2"], *head, *inputs, *cached, *more)
    assert status == 0 and "pixels: published, as noted in --saved_fc" in output, output
    assert "computed in fp32" in output and "frozen backbone" not in output, output


def test_a_damaged_record_is_reported(cache, tmp_path, capsys):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    with open(damaged / "rows-00000.bin", "r+b") as file:
        file.write(b"\0\0\0\0")
    assert feature_cache.main(["verify", str(damaged)]) == 1
    assert capsys.readouterr().out.startswith("127 intact records, 1 damaged")
