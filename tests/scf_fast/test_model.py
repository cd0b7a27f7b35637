"""A model from the files of stage 2 and of other code."""

import pytest
import torch

from scf_fast import SCF
from scf_fast.checkpoints import main
from scf_fast.errors import InputError
from scf_fast.model import save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.objectives import Density, Objective
from scf_fast.weights.contents import Weights
from scf_fast.weights.files import save_torch_file
from scf_fast.weights.writing import write_weights


def test_model_file_round_trip(tmp_path, small_backbone):
    torch.manual_seed(0)
    net, confidence = small_backbone("published"), build_confidence_net("conv", 128, 7).eval()
    save_model(
        tmp_path / "scf_model.pt",
        net.state_dict(),
        confidence.state_dict(),
        radius=32.0,
        normalization="published",
        epoch=1,
    )
    images = torch.randn(2, 3, 112, 112)
    for path in (tmp_path, tmp_path / "scf_model.pt"):
        model = SCF.from_checkpoint(path)
        features, log_kappa = model.embed(images)
        with torch.no_grad():
            expected, convf = net(images)
            torch.testing.assert_close(features, expected)
            torch.testing.assert_close(log_kappa, confidence(convf))
        mu, kappa = model(images)
        torch.testing.assert_close(mu.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(kappa, log_kappa.exp())
        assert (model.radius, model.normalization, model.embedding_dim) == (32.0, "published", 32)
    save_torch_file(net.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(
        ValueError, match="must hold a confidence net's state_dict of tensors, but holds backbone ir_small"
    ):
        SCF.from_checkpoint(tmp_path / "backbone.pth")


@pytest.mark.parametrize(
    "family, net, normalization",
    [("published", "mlp", "published"), ("tface", "conv", "insightface"), ("insightface", "conv", "insightface")],
)
def test_a_model_from_the_files_of_other_code(family, net, normalization, tmp_path, save_as):
    """Backbone and confidence net apart, as the published code and TFace save them, and the same two in one file of
    ours.
    """
    saved = save_as(family, tmp_path, name="ir_tiny" if net == "mlp" else None)
    saved_bkb, trunk = saved.saved_bkb, saved.backbone
    if family == "insightface":
        saved_bkb = tmp_path / "checkpoint_gpu_0.pt"
    confidence = build_confidence_net(net, trunk.architecture.widths[-1], 7).eval()
    torch.save({"epoch": 0, "uncer_net_state_dict": confidence.state_dict()}, tmp_path / "ckpt_e1.pt")
    both = f"{saved_bkb},{tmp_path}/ckpt_e1.pt"
    images = torch.randn(1, 3, 112, 112)
    model = SCF.from_checkpoint(both)
    assert (model.radius, model.normalization) == (64.0, normalization)
    mu, kappa = model(images)
    with torch.no_grad():
        features, convf = trunk(images)
        torch.testing.assert_close(mu, torch.nn.functional.normalize(features))
        torch.testing.assert_close(kappa, confidence(convf).exp())
    assert SCF.from_checkpoint(both, radius=16.0, normalization="published").radius == 16.0
    source = both if family != "insightface" else str(tmp_path / "whole")
    if family == "insightface":
        write_weights(
            Weights(backbone=trunk.state_dict(), confidence_net=confidence.state_dict()), source, "safetensors"
        )
    assert main(["convert", source, str(tmp_path / "model.pt"), "--to", "scf_fast", "--radius", "32"]) == 0
    assert torch.equal(SCF.from_checkpoint(tmp_path / "model.pt")(images)[0], mu)
    with pytest.raises(ValueError, match=r"was trained with radius 32.0, got 64.0"):
        SCF.from_checkpoint(tmp_path / "model.pt", radius=64.0)
    torch.save(build_confidence_net("mlp", 8, 7).state_dict(), tmp_path / "small")
    with pytest.raises(ValueError, match="the confidence net does not fit the"):
        SCF.from_checkpoint(f"{saved_bkb},{tmp_path}/small")


def gaussian_file(path, objective=Objective.SCF_GAUSSIAN, net="conv", outputs=1):
    """A model file of a small backbone of width 24, and its networks."""
    torch.manual_seed(0)
    backbone = Backbone("ir_tiny", 24).eval()
    confidence = build_confidence_net(net, 16, 7, initial_kappa=1e-2, outputs=outputs).eval()
    states = backbone.state_dict(), confidence.state_dict()
    save_model(path, *states, radius=64.0, normalization="insightface", objective=objective)
    return backbone, confidence


@pytest.mark.parametrize(
    ("objective", "net", "outputs"), [(Objective.SCF_GAUSSIAN, "conv", 1), (Objective.PFE, "pfe", 24)]
)
def test_gaussian_models_give_precision_and_log_variances(objective, net, outputs, tmp_path):
    backbone, confidence = gaussian_file(tmp_path / "scf_model.pt", objective, net, outputs)
    model, images = SCF.from_checkpoint(tmp_path), torch.randn(3, 3, 112, 112)
    assert (model.objective, model.density, model.outputs) == (objective, Density.GAUSSIAN, outputs)
    with torch.no_grad():
        features, convf = backbone(images)
        expected = confidence(convf)
    torch.testing.assert_close(model.log_variance(images), expected)
    torch.testing.assert_close(model.embed(images)[1], expected)
    mu, precision = model(images)
    torch.testing.assert_close(mu, torch.nn.functional.normalize(features))
    harmonic_mean = outputs / (1 / expected.double().exp()).reshape(3, outputs).sum(dim=1)
    torch.testing.assert_close(precision, (1 / harmonic_mean).float())


def test_files_without_an_objective_are_scf(tmp_path, small_backbone):
    """As this program wrote them before it had objectives."""
    net, confidence = small_backbone("published"), build_confidence_net("conv", 128, 7).eval()
    content = {
        "format": "scf_fast model",
        "backbone_state_dict": net.state_dict(),
        "uncer_net_state_dict": confidence.state_dict(),
        "radius": 32.0,
        "normalization": "published",
        "normalizer": "exact",
    }
    torch.save(content, tmp_path / "scf_model.pt")
    model, images = SCF.from_checkpoint(tmp_path), torch.randn(1, 3, 112, 112)
    assert (model.objective, model.density) == (Objective.SCF, Density.VMF)
    torch.testing.assert_close(model(images)[1], model.embed(images)[1].exp())
    with pytest.raises(ValueError, match="needs a model of a Gaussian objective, and this one is of SCF; call the"):
        model.log_variance(images)
    with pytest.raises(ValueError, match="and this one is a backbone alone"):
        SCF(net, None).log_variance(images)


@pytest.mark.parametrize(
    ("objective", "outputs", "message"),
    [
        (None, 24, "of a model of SCF must have 1 output, got 24; its file states another objective"),
        (Objective.PFE_VMF, 24, "of a model of PFE-v must have 1 output, got 24"),
        (Objective.PFE, 7, "of a model of PFE-G must have 1 output or 24, one for each dimension, got 7"),
    ],
)
def test_outputs_that_do_not_fit_the_objective_are_refused(objective, outputs, message, tmp_path):
    gaussian_file(tmp_path / "scf_model.pt", objective, outputs=outputs)
    with pytest.raises(InputError, match=f"^model .*{message}"):
        SCF.from_checkpoint(tmp_path)


def test_an_unknown_objective_is_refused(tmp_path, capsys):
    gaussian_file(tmp_path / "m.pt")
    torch.save(torch.load(tmp_path / "m.pt") | {"objective": "later"}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="objective 'later', which this version does not know"):
        SCF.from_checkpoint(tmp_path / "m.pt")
    assert main(["inspect", str(tmp_path / "m.pt")]) == 0 and "objective later" in capsys.readouterr().out


def test_conversion_keeps_the_objective_or_refuses(tmp_path, capsys):
    source = str(tmp_path / "m.pt")
    for objective in Objective.SCF_GAUSSIAN, Objective.PFE_VMF:
        gaussian_file(source, objective)
        for layout in "scf_fast", "safetensors":
            assert main(["convert", source, str(tmp_path / "out"), "--to", layout, "--overwrite"]) == 0
            assert f"confidence net conv for {objective.value} on 16 values" in capsys.readouterr().out
            assert SCF.from_checkpoint(tmp_path / "out").objective is objective
        part = ["--to", "tface", "--part", "confidence_net", "--overwrite"]
        assert main(["convert", source, str(tmp_path / "out"), *part]) == 2
        error = capsys.readouterr().err
        assert f"confidence net is one of {objective.title}" in error and error.count("\n") == 1
    gaussian_file(source, Objective.SCF_GAUSSIAN, "mlp")
    command = ["convert", source, str(tmp_path / "out"), "--to", "published", "--overwrite"]
    assert main(command) == 2
    assert "is one of SCF-G and predicts variances, which published would take" in capsys.readouterr().err
    gaussian_file(source, Objective.PFE_VMF, "mlp")
    assert main(command) == 0 and SCF.from_checkpoint(tmp_path / "out").objective is Objective.PFE_VMF
