import pickle

import pytest
import torch

from scf_fast import checkpoints
from scf_fast.backbones import Backbone
from scf_fast.confidence import build_confidence_net
from scf_fast.model import load_model, save_model


def test_weight_files_in_the_published_formats(tmp_path):
    state = {"a.weight": torch.randn(2, 3)}
    for name, value in {"bare": state, "nested": {"state_dict": state}, "parallel": {f"module.{k}": v for k, v in state.items()}}.items():
        checkpoints.save_file(value, tmp_path / name)
        assert torch.equal(checkpoints.backbone_state(tmp_path / name)["a.weight"], state["a.weight"])
    centers = torch.randn(5, 4)
    for value in (centers, {"arc_face_state_dict": {"weight": centers}, "epoch": 3}):
        checkpoints.save_file(value, tmp_path / "fc")
        assert torch.equal(checkpoints.class_centers(tmp_path / "fc"), centers)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_bad_files_are_one_clear_line(tmp_path, capsys):
    cases = {"missing": (None, "cannot be read"), "text": (b"hello", "is no checkpoint of tensors"), "empty": (b"", "is no checkpoint of tensors"),
             "code": (pickle.dumps(Evil()), "is no checkpoint of tensors")}
    for name, (content, expected) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"--saved_bkb .*{name}: {expected}") as error:
            checkpoints.backbone_state(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save({"x": Evil()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="is no checkpoint of tensors"):
        checkpoints.class_centers(tmp_path / "code.pt")
    assert "must not run" not in capsys.readouterr().out
    torch.save({"a": torch.zeros(2)}, tmp_path / "state")
    with pytest.raises(ValueError, match="is it a backbone file"):
        checkpoints.class_centers(tmp_path / "state")
    torch.save(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), tmp_path / "zero")
    with pytest.raises(ValueError, match="no row zero"):
        checkpoints.class_centers(tmp_path / "zero")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="must hold a state_dict"):
        checkpoints.backbone_state(tmp_path / "list")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.pt"
    checkpoints.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save_file({"a": lambda: 0}, path)
    assert torch.load(path)["a"].item() == 1


def test_model_file_round_trip(tmp_path):
    torch.manual_seed(0)
    backbone, net = Backbone("ir_small", 32).eval(), build_confidence_net("conv", 128, 7).eval()
    save_model(tmp_path / "scf_model.pt", backbone.state_dict(), net.state_dict(), radius=32.0, normalization="published", epoch=1)
    images = torch.randn(2, 3, 112, 112)
    for path in (tmp_path, tmp_path / "scf_model.pt"):
        model = load_model(path)
        features, log_kappa = model.embed(images)
        with torch.no_grad():
            expected, convf = backbone(images)
            torch.testing.assert_close(features, expected)
            torch.testing.assert_close(log_kappa, net(convf))
        mu, kappa = model(images)
        torch.testing.assert_close(mu.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(kappa, log_kappa.exp())
        assert (model.radius, model.normalization, model.embedding_dim) == (32.0, "published", 32)
    checkpoints.save_file(backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="must hold backbone, confidence net"):
        load_model(tmp_path / "backbone.pth")
