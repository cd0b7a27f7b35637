"""Stage 1: a backbone under a margin softmax over all identities."""
from pathlib import Path

import torch
from torch import nn

from kernels.margin_softmax import margin_softmax_loss
from pipelines.loader import Batch, Loader
from scf_fast import checkpoints
from scf_fast.backbones import Backbone
from scf_fast.config import Config
from scf_fast.engine import full_state_dict
from scf_fast.inputs import image_loader
from scf_fast.launch import Runtime

BACKBONE_FILE, CENTERS_FILE = "backbone.pth", "fc.pth"


class MarginClassifier(nn.Module):
    """Backbone and class centers in one module, so that the engine trains both."""

    def __init__(self, backbone: Backbone, num_classes: int, config: Config):
        super().__init__()
        self.backbone = backbone
        self.class_centers = nn.Parameter(torch.empty(num_classes, backbone.z_dim).normal_(std=0.01))
        self._loss = {"scale": config.scale, "margins": config.margins, "margin_gradient": config.margin_gradient}

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and (B,) bool correct."""
        features, _ = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            return margin_softmax_loss(features, self.class_centers, labels, **self._loss)


class BackboneStage:
    """What :mod:`scf_fast.trainer` needs to train stage 1."""

    optimizer_rule = "sgd"

    def __init__(self, config: Config, source):
        self.config, self.num_classes = config, source.num_classes
        if self.num_classes < 2:
            raise ValueError(f"--data {config.data}: stage 1 needs at least 2 identities, got {self.num_classes}")

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """The module for the engine. Its weights stay contiguous, as DeepSpeed needs them; channels_last images make the convolutions so."""
        backbone = Backbone(self.config.network, self.config.z_dim, self.config.dropout)
        return MarginClassifier(backbone, self.num_classes, self.config).to(runtime.device)

    def make_loader(self, source, sampler, runtime: Runtime) -> Loader:
        """Batches of images."""
        return image_loader(self.config, source, sampler, runtime)

    def loss(self, engine, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch and what to log of it, all on the device."""
        loss, correct = engine(batch.images, batch.labels)
        return loss, {"loss": loss.detach(), "accuracy": correct.float().mean()}

    def export(self, engine, folder: Path, is_main: bool, progress: dict) -> list[Path]:
        """Write backbone and class centers in the published formats; collective."""
        state = full_state_dict(engine, engine.module)
        backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        files = [folder / BACKBONE_FILE, folder / CENTERS_FILE]
        if is_main:
            checkpoints.save_file(backbone, files[0])
            checkpoints.save_file({"arc_face_state_dict": {"weight": state["class_centers"]}, **progress}, files[1])
        return files
