"""Stage 1: a backbone under a margin softmax over all identities."""

import logging
from pathlib import Path

import torch
from torch import nn

from scf_fast import distributed
from scf_fast.config import Config
from scf_fast.data import image_loader
from scf_fast.distributed import Runtime
from scf_fast.engine.class_centers import ClassCenters
from scf_fast.engine.deepspeed_config import resolve_precision
from scf_fast.engine.engine import full_state_dict
from scf_fast.errors import InputError
from scf_fast.kernels.margin_softmax import check_margin_softmax
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.families import family_state
from scf_fast.pipelines.loading.base import Batch, Loader
from scf_fast.stages.memory_forecast import forecast
from scf_fast.weights.files import BACKBONE_FILE, CENTERS_FILE, save_torch_file

log = logging.getLogger(__name__)


class BackboneStage:
    """What :mod:`scf_fast.trainer` needs to train stage 1.

    The engine trains the backbone alone. ``centers``, there from :meth:`build` on, are beside it: they take the
    engine's learning rate, and whoever makes the engine's step makes theirs, ``centers.step()``, after it.
    """

    optimizer_rule = "sgd"
    centers: ClassCenters

    def __init__(self, config: Config, source):
        self.config, self.num_classes = config, source.num_classes
        if self.num_classes < 2:
            raise InputError(f"--data {config.data}: stage 1 needs at least 2 identities, got {self.num_classes}")
        check_margin_softmax(config.margins, config.margin_gradient, config.label_smoothing)
        _, world_size = distributed.environment()
        precision = resolve_precision(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.memory = forecast(config, self.num_classes, world_size, precision)
        self.memory.check()

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """The module for the engine. Its weights stay contiguous, as DeepSpeed needs them; channels_last images make
        the convolutions so.
        """
        log.info("%s", self.memory)
        self.centers = ClassCenters(self.num_classes, self.config.z_dim, self.config, runtime, precision)
        return Backbone(self.config.network, self.config.z_dim, self.config.dropout).to(runtime.device)

    def network(self) -> tuple[str, int]:
        """Name and embedding width of the backbone."""
        return self.config.network, self.config.z_dim

    def make_loader(self, source, sampler, runtime: Runtime) -> Loader:
        """Batches of images."""
        return image_loader(self.config, source, sampler, runtime, self.config.flip)

    def loss(self, engine, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch, over all ranks' images, and what to log of it, all on the device."""
        features, _ = engine(batch.images)
        self.centers.lr = engine.basic_optimizer.param_groups[0]["lr"]
        loss, correct = self.centers.loss(features.float(), batch.labels)
        return loss, {"loss": loss.detach(), "accuracy": correct.float().mean()}

    def look(self, step: int, means: dict[str, float]) -> None:
        """At what is logged of a step; there is nothing here to warn of that the loss does not show."""

    def export(self, engine, folder: Path, is_main: bool, progress: dict) -> list[Path]:
        """Write the backbone under its family's names, the class centers as the published code has them; collective.

        Raises:
            OSError: on the main rank, after every collective step, what could not be written.
        """
        state = family_state(full_state_dict(engine, engine.module), engine.module.architecture)
        files = [folder / BACKBONE_FILE, folder / CENTERS_FILE]
        self.centers.export(files[1], {"normalization": self.config.normalization, **progress})
        if is_main:
            save_torch_file(state, files[0])
        return files
