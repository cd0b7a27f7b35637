"""A trained SCF model: image -> direction mu and concentration kappa."""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast import checkpoints
from scf_fast.backbones import Backbone, identify_backbone
from scf_fast.confidence import build_confidence_net, identify_confidence_net

MODEL_FILE = "scf_model.pt"  # what stage 2 leaves in its output folder


class SCF(nn.Module):
    """Backbone and confidence net, in evaluation mode.

    Attributes:
        radius: r of the sphere that the confidence net was trained for.
        normalization: pixel convention, ``"insightface"`` or ``"published"`` (see ``pipelines.loader.Preprocessing``).
        embedding_dim: width d of the features.
    """

    def __init__(self, backbone: nn.Module, confidence_net: nn.Module, radius: float = 64.0, normalization: str = "insightface"):
        super().__init__()
        self.backbone, self.confidence_net = backbone, confidence_net
        self.radius, self.normalization, self.embedding_dim = radius, normalization, backbone.z_dim
        self.eval()

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) normalised RGB -> unnormalised features (B, d) and log kappa (B,), both float32."""
        features, convf = self.backbone(images)
        return features.float(), self.confidence_net(convf).float()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) normalised RGB -> unit directions mu (B, d) and kappa (B,), both float32."""
        features, log_kappa = self.embed(images)
        return F.normalize(features), log_kappa.exp()


def save_model(path: Path, backbone_state: dict, confidence_state: dict, *, radius: float, normalization: str, **provenance) -> None:
    """One file with everything that :func:`load_model` needs."""
    checkpoints.save_file({"format": "scf_fast model", "backbone_state_dict": backbone_state, "uncer_net_state_dict": confidence_state,
                           "radius": radius, "normalization": normalization, **provenance}, path)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SCF:
    """The model in a file that stage 2 wrote, or in the output folder of a stage-2 run.

    Raises:
        ValueError: nothing there, or no SCF model in it.
    """
    path = Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    value = checkpoints.load_file(file, "model")
    if not isinstance(value, dict) or not {"backbone_state_dict", "uncer_net_state_dict", "radius", "normalization"} <= value.keys():
        raise ValueError(f"model {file}: must hold backbone, confidence net, radius and normalization as stage 2 writes them to {MODEL_FILE}")
    name, z_dim = identify_backbone(value["backbone_state_dict"])
    backbone = Backbone(name, z_dim)
    backbone.load_state_dict(value["backbone_state_dict"])
    architecture = backbone.architecture
    net = build_confidence_net(identify_confidence_net(value["uncer_net_state_dict"]), architecture.widths[-1], architecture.map_size)
    net.load_state_dict(value["uncer_net_state_dict"])
    return SCF(backbone, net, value["radius"], value["normalization"]).to(device)
