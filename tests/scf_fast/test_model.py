"""A model from the files of stage 2 and of other code."""

import pytest
import torch

from scf_fast import SCF
from scf_fast.checkpoints import main
from scf_fast.model import save_model
from scf_fast.networks.confidence import build_confidence_net
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
