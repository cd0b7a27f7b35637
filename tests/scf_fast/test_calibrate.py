"""The factor on kappa: found from people held out, put into the net, refused for people of the training."""

import numpy as np
import pytest
import torch
import yaml

from scf_fast.calibrate import choose_images, embed, main
from scf_fast.inference import Decoding, Embedder, InferenceOptions
from scf_fast.model import SCF, save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import CONFIDENCE_NETS, build_confidence_net
from scf_fast.objectives import Objective
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loading.decode import pack_face
from scf_fast.pipelines.sources.base import EncodedImages
from scf_fast.weights.reading import read_weights


@pytest.mark.parametrize("name", list(CONFIDENCE_NETS))
def test_every_net_can_be_multiplied(name):
    torch.manual_seed(0)
    net, x = build_confidence_net(name, 4, 7, 50.0).eval(), torch.randn(5, 4, 7, 7)
    before = net(x)
    net.multiply(0.25)
    assert net(x).exp().tolist() == pytest.approx((before.exp() / 4).tolist(), rel=1e-5)


@pytest.fixture
def run_folder(stage2, tmp_path):
    """A model of stage 2 whose kappa is thrice the trained one."""
    model = SCF.from_checkpoint(stage2[0])
    model.confidence_net.multiply(3.0)
    parts = model.backbone.state_dict(), model.confidence_net.state_dict()
    save_model(tmp_path / "scf_model.pt", *parts, radius=64.0, normalization=model.normalization)
    return tmp_path


def test_the_factor_is_found_again(run_folder, stage2, faces, capsys):
    data = ["--data", str(faces / "train"), "--num-workers", "1"]
    outputs = [run_folder / name for name in ("a.pt", "b.pt", "c.pt")]
    for model, output in zip((stage2[0] / "scf_model.pt", run_folder / "scf_model.pt", outputs[1]), outputs):
        if model.parent == stage2[0]:  # away from its run, whose people these are
            model = run_folder / "other.pt"
            model.write_bytes((stage2[0] / "scf_model.pt").read_bytes())
        assert main([str(model), *data, "--output", str(output)]) == 0
    a, b, c = (read_weights(output, "model").facts.kappa_factor for output in outputs)
    assert b == pytest.approx(a / 3, rel=1e-4) and c == pytest.approx(b, rel=1e-3)  # nothing is left to mend
    images = torch.randn(2, 3, 112, 112)
    found = [SCF.from_checkpoint(output)(images)[1] for output in outputs]
    assert found[0].tolist() == pytest.approx(found[1].tolist(), rel=1e-3)
    assert "before: mean difference" in capsys.readouterr().out


def test_people_of_the_training_are_refused_and_held_out_ones_are_found(faces, tmp_path, capsys):
    config = {"data": str(faces / "train"), "dataroot": None, "seed": 5, "validation": 0.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": config}))
    with pytest.raises(ValueError, match="trained on these people, whose kappa needs no factor"):
        choose_images(tmp_path, None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": config | {"validation": 0.25}}))
    _, chosen = choose_images(tmp_path / "scf_model.pt", str(faces / "train"))
    assert chosen.sum() == 32 and len(np.unique(open_source(faces / "train").labels[chosen])) == 2
    with pytest.raises(ValueError, match="--data must be given: there is no"):
        choose_images(tmp_path / "elsewhere" / "model.pt", None)


def test_a_variance_is_not_calibrated(faces, tmp_path, capsys):
    backbone, net = Backbone("ir_tiny", 16), build_confidence_net("mlp", 16, 7)
    facts = {"radius": 64.0, "normalization": "published", "objective": Objective.SCF_GAUSSIAN}
    save_model(tmp_path / "m.pt", backbone.state_dict(), net.state_dict(), **facts)
    status = main([str(tmp_path / "m.pt"), "--data", str(faces / "train"), "--output", str(tmp_path / "o.pt")])
    error = capsys.readouterr().err
    assert status == 2 and "is a model of SCF-G, which has a variance" in error and len(error.splitlines()) == 1


def test_an_image_that_cannot_be_decoded_is_left_out():
    faces = np.random.default_rng(0).integers(0, 256, (6, 112, 112, 3), dtype=np.uint8)
    files = [pack_face(face) for face in faces]
    files[2] = files[2][:500]
    net = build_confidence_net("conv", 16, 7, initial_kappa=100.0)
    embedder = Embedder(SCF(Backbone("ir_tiny", 16), net, radius=64.0, normalization="published"))
    source, images = EncodedImages(files, labels=np.arange(6) // 2), np.arange(1, 6)
    options = InferenceOptions(batch_size=2, decoding=Decoding("torch", 0))
    held = embed(embedder, source, images, options)
    assert held.labels.tolist() == [0, 1, 2, 2] and len(held.mu) == len(held.kappa) == 4
    np.testing.assert_allclose(held.mu, embed(embedder, source, np.array([1, 3, 4, 5]), options).mu, atol=1e-6)
    with pytest.raises(ValueError, match="image 2 cannot be decoded"):
        embed(embedder, source, images, InferenceOptions(decoding=Decoding("torch", 0), strict=True))
