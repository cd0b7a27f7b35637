"""Stage 2 with the backbone in training too: what the published flag ``--finetune_bkb`` stands for."""

import torch
from torch import nn

from scf_fast.data import image_loader
from scf_fast.distributed import Runtime
from scf_fast.engine.engine import full_state_dict
from scf_fast.networks.backbones import Backbone
from scf_fast.pipelines.loading.base import Batch, Loader
from scf_fast.stages.confidence import ConfidenceStage


class JointModel(nn.Module):
    """Backbone and confidence net in one module, so that the engine trains both."""

    def __init__(self, backbone: nn.Module, confidence_net: nn.Module):
        super().__init__()
        self.backbone, self.confidence_net = backbone, confidence_net

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) -> features (B, z_dim), log_kappa (B,), float32."""
        features, convf = self.backbone(images)
        return features.float(), self.confidence_net(convf)


class FinetuneStage(ConfidenceStage):
    """The loss reaches the backbone through ``mu`` and through ``convf``.

    As in the published code the backbone is in train mode: BatchNorm takes the batch's statistics and goes on averaging
    them, and dropout is on. The class centers stay fixed.
    """

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """The module for the engine: backbone and confidence net."""
        net = super().build(runtime, precision)
        backbone = Backbone(self.name, self.z_dim)
        backbone.load_state_dict(self.backbone_state)
        return JointModel(backbone, net).to(runtime.device)

    def make_loader(self, source, sampler, runtime: Runtime) -> Loader:
        """Batches of images."""
        return image_loader(self.config, source, sampler, runtime, self.config.flip)

    def loss(self, engine, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch and what to log of it, all on the device."""
        return self._scf_loss(*engine(batch.images), batch.labels)

    def _trained_states(self, engine) -> tuple[dict, dict | None]:
        state = full_state_dict(engine, engine.module)
        net, backbone = (
            {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
            for part in ("confidence_net.", "backbone.")
        )
        return net, backbone
