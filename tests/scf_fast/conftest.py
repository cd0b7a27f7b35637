"""Runs of both stages on a small synthetic data set, made once a session, and weight files of every family."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scf_fast.networks.backbones import Backbone
from scf_fast.weights.family_names import family_state


@pytest.fixture(scope="session")
def faces(tmp_path_factory, fork_ranks):
    """A small synthetic data set."""
    root = tmp_path_factory.mktemp("faces") / "set"
    sizes = ["--identities", 8, "--images-per-identity", 16, "--eval-identities", 0]
    status, output = fork_ranks(0, root, *sizes, "--seed", 3, module="scf_fast.pipelines.synthetic")
    assert status == 0, output
    return root


_COMMON = ["--batch_size", "32", "--epochs", "2", "--log_every", "1", "--num_workers", "1"]
_FLAGS = {
    "stage1": ["--stage", "backbone", "--network", "ir_tiny", "--z_dim", "32", "--lr", "0.01", *_COMMON],
    "stage2": ["--stage", "confidence", "--confidence_net", "conv", "--precision", "fp32", "--lr", "1e-3", *_COMMON],
}
_FLAGS["stage2"] += ["--initial_kappa", "100"]  # far above the best, so that eight steps have a way to go


@pytest.fixture(scope="session")
def flags():
    """Flags of the launches of both stages."""
    return _FLAGS


@pytest.fixture(scope="session")
def stage1(faces, tmp_path_factory, fork_ranks):
    """Output folder of a whole stage 1 on two ranks, and its log."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    status, output = fork_ranks(2, *_FLAGS["stage1"], "--zero_stage", 2, "--data", faces / "train", "--output_dir", out)
    assert status == 0, output
    return out, output


@pytest.fixture(scope="session")
def stage2(faces, stage1, tmp_path_factory, fork_ranks):
    """The same for stage 2, on the backbone of stage 1."""
    out = tmp_path_factory.mktemp("stage2") / "run"
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth"]
    status, output = fork_ranks(2, *_FLAGS["stage2"], *weights, "--data", faces / "train", "--output_dir", out)
    assert status == 0, output
    return out, output


_SMALL = {"published": "ir_small", "tface": "tface_ir_small", "insightface": "iresnet_small"}


@pytest.fixture(scope="session")
def small_backbone():
    """``small_backbone(family, name=None)``: a small backbone of a family, in evaluation mode, with the
    BatchNorm statistics of a trained one.
    """

    def make(family, name=None):
        torch.manual_seed(1)
        net = Backbone(name or _SMALL[family], 32).eval()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        return net

    return make


@dataclass
class WeightFiles:
    """What ``save_as`` has written, and what must be read from it."""

    saved_bkb: Path
    saved_fc: Path
    backbone: Backbone
    centers: torch.Tensor


@pytest.fixture(scope="session")
def save_as(small_backbone):
    """``save_as(family, folder, ranks=2, name=None)``: the files that the family's training code writes, by hand."""

    def insightface(folder, net, centers, ranks):
        state = family_state(net.state_dict(), net.architecture)
        for rank, shard in enumerate(centers.tensor_split(ranks)):
            # Nothing synchronizes the statistics there.
            other = {key: value + rank if key.endswith("running_mean") else value for key, value in state.items()}
            content = {
                "epoch": 3,
                "global_step": 120,
                "state_dict_backbone": other,
                "state_dict_softmax_fc": {"weight": shard.clone()},
                "state_optimizer": {
                    "state": {0: {"momentum_buffer": torch.zeros(2, 2)}},
                    "param_groups": [{"lr": 0.1, "params": [0]}],
                },
                "state_lr_scheduler": {"base_lrs": [0.1]},
            }
            torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
        return folder, folder

    def tface(folder, net, centers, _):
        torch.save(family_state(net.state_dict(), net.architecture), folder / "Backbone_Epoch_27_checkpoint.pth")
        torch.save(centers, folder / "wc.pth")
        return folder / "Backbone_Epoch_27_checkpoint.pth", folder / "wc.pth"

    def published(folder, net, centers, _):
        torch.save(net.state_dict(), folder / "b.pth")
        torch.save({"arc_face_state_dict": {"weight": centers}}, folder / "f.pth")
        return folder / "b.pth", folder / "f.pth"

    def save(family, folder, ranks=2, name=None):
        net, centers = small_backbone(family, name), torch.randn(5, 32)
        write = {"published": published, "tface": tface, "insightface": insightface}[family]
        return WeightFiles(*write(folder, net, centers, ranks), net, centers)

    return save
