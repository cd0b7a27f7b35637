"""Stage 2 with the backbone in training too: what the published flag ``--finetune_bkb`` stands for."""

from typing import Any

import torch
from torch import nn

from scf_fast.data import image_loader
from scf_fast.distributed import Runtime
from scf_fast.engine.engine import Engine
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import ConfidenceNet
from scf_fast.objectives import Objective
from scf_fast.pipelines.loading.base import Batch
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.stages.confidence import ConfidenceStage, states_of
from scf_fast.weights.family_names import StateDict


class JointModel(nn.Module):
    """Backbone and confidence net in one module, so that the engine trains both."""

    def __init__(self, backbone: nn.Module, confidence_net: nn.Module):
        super().__init__()
        self.backbone, self.confidence_net = backbone, confidence_net

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 112, 112) -> features (B, z_dim) and what the confidence net predicts, float32."""
        features, convf = self.backbone(images)
        return features.float(), self.confidence_net(convf)


class FinetuneStage(ConfidenceStage):
    """Trains the backbone too: the loss reaches it through ``mu`` and through ``convf``.

    As in the published code the backbone is in train mode: BatchNorm takes the batch's statistics and goes on averaging
    them, and dropout is on. The class centers stay fixed.
    """

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """Returns backbone and confidence net in one module."""
        net = super().build(runtime, precision)
        backbone = Backbone(self.name, self.z_dim)
        backbone.load_state_dict(self.backbone_state)
        return JointModel(backbone, net).to(runtime.device)

    def make_loader(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> BatchLoader[Any]:
        """Returns the loader of images."""
        opened, self._opened = self._opened, None
        self._hold_out(source, runtime)
        return opened or self.pair_up(image_loader(self.config, source, sampler, runtime, self.config.flip), sampler)

    def load_held_out(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> BatchLoader[Any]:
        """Returns a loader of images."""
        return image_loader(self.config, source, sampler, runtime, flip=False)

    def _nets(self, module: nn.Module) -> dict[Objective, ConfidenceNet]:
        assert isinstance(module, JointModel)
        return super()._nets(module.confidence_net)

    @torch.no_grad()
    def _frozen_outputs(self, module: nn.Module, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(module, JointModel)
        module.backbone.eval()
        outputs = module.backbone(inputs.images)
        module.backbone.train()
        return outputs

    def _forward(self, engine: Engine, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return engine(inputs.images)

    def _trained_states(self, engine: Engine) -> tuple[StateDict, StateDict | None]:
        state = engine.full_state_dict()
        return states_of(state, "confidence_net"), states_of(state, "backbone")
