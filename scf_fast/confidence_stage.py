"""Stage 2: log kappa from the frozen backbone's last feature map, under the SCF loss."""
from pathlib import Path

import torch
from torch import nn

from kernels import scf_loss
from scf_fast import checkpoints
from scf_fast.backbones import BACKBONES, Backbone, identify_backbone
from scf_fast.confidence import build_confidence_net
from scf_fast.config import Config
from scf_fast.engine import full_state_dict
from scf_fast.features import FeatureBatch, FeatureStream
from scf_fast.frozen import FrozenBackbone, frozen_precisions
from scf_fast.inputs import image_loader
from scf_fast.launch import Runtime
from scf_fast.model import MODEL_FILE, save_model

CONFIDENCE_FILE = "confidence.pth"


class ConfidenceStage:
    """What :mod:`scf_fast.trainer` needs to train stage 2."""

    optimizer_rule = "adam"

    def __init__(self, config: Config, source):
        self.config = config
        self.backbone_state = checkpoints.backbone_state(config.saved_bkb)
        try:
            self.name, self.z_dim = identify_backbone(self.backbone_state)
        except ValueError as error:
            raise ValueError(f"--saved_bkb {config.saved_bkb}: {error}") from None
        for flag, given, actual in (("convf_dim", config.convf_dim, BACKBONES[self.name].convf_dim), ("z_dim", config.z_dim, self.z_dim)):
            if given not in (None, actual):
                raise ValueError(f"--{flag} must be {actual} for the {self.name} in {config.saved_bkb}, got {given}; leave it out")
        self.class_centers = checkpoints.class_centers(config.saved_fc)
        classes, width = self.class_centers.shape
        if width != self.z_dim:
            raise ValueError(f"--saved_fc {config.saved_fc}: class centers are {width} wide but the backbone's features {self.z_dim}; "
                             "both files must come from the same stage-1 run")
        if source.num_classes > classes:
            raise ValueError(f"--data {config.data} has {source.num_classes} identities but --saved_fc {config.saved_fc} only {classes} class centers; "
                             "train stage 2 on the identities of stage 1")

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """The module for the engine: the confidence net alone. The frozen backbone and the class centers stay outside."""
        backbone = Backbone(self.name, self.z_dim)
        backbone.load_state_dict(self.backbone_state)
        self.backbone = FrozenBackbone(backbone, runtime.device, frozen_precisions(self.config.precision, runtime.device))
        self.class_centers = self.class_centers.to(runtime.device)
        architecture = backbone.architecture
        net = build_confidence_net(self.config.confidence_net, architecture.widths[-1], architecture.map_size, self.config.initial_kappa)
        return net.to(runtime.device)

    def make_loader(self, source, sampler, runtime: Runtime) -> FeatureStream:
        """Batches of features."""
        return FeatureStream(image_loader(self.config, source, sampler, runtime), self.backbone)

    def loss(self, engine, batch: FeatureBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch and what to log of it, all on the device. Tags are those of the published code."""
        features, convf, labels = batch
        log_kappa = engine(convf.float())
        loss, terms = scf_loss(features, log_kappa, self.class_centers, labels, radius=self.config.radius,
                               normalizer=self.config.normalizer, return_terms=True)
        return loss, {"total_loss": loss.detach(), "kappa": terms.kappa.mean(), "neg_kappa_times_cos_theta": terms.l1.mean(),
                      "neg_dim_scalar_times_log_kappa": terms.l2.mean(), "log_iv_kappa": terms.l3.mean(), "cos_theta": terms.cos.mean(),
                      "kappa_distribution": terms.kappa}

    def export(self, engine, folder: Path, is_main: bool, progress: dict) -> list[Path]:
        """Write the confidence net as the published code names it, and the whole model in one file; collective."""
        state = full_state_dict(engine, engine.module)
        files = [folder / CONFIDENCE_FILE, folder / MODEL_FILE]
        if is_main:
            checkpoints.save_file({"uncer_net_state_dict": state, **progress}, files[0])
            save_model(files[1], self.backbone_state, state, radius=self.config.radius, normalization=self.config.normalization,
                       normalizer=self.config.normalizer, **progress)
        return files
