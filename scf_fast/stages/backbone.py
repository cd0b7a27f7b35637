"""Stage 1: a backbone under a margin softmax over all identities."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from scf_fast.config import BackboneConfig
from scf_fast.data import image_loader
from scf_fast.distributed import Runtime
from scf_fast.engine.class_centers import ClassCenters
from scf_fast.engine.engine import Engine
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.errors import InputError
from scf_fast.kernels.margin_softmax import check_margin_softmax
from scf_fast.networks.backbones import BACKBONES, Backbone
from scf_fast.pipelines.loading.base import Batch, Loader
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.stages.base import NetworkShape, Progress, Stage, StepResult
from scf_fast.stages.memory_forecast import MemoryForecast, forecast
from scf_fast.weights.family_names import family_state
from scf_fast.weights.files import BACKBONE_FILE, CENTERS_FILE, save_torch_file


class BackboneStage(Stage):
    """Trains a backbone; see :class:`scf_fast.stages.base.Stage`.

    The engine trains the backbone alone. The class centers are beside it: they take the engine's learning rate, and
    whoever makes the engine's step makes theirs, ``centers.step()``, after it.
    """

    loss_name = "loss"
    config: BackboneConfig
    centers: ClassCenters | None = None

    def __init__(self, config: BackboneConfig, source: ImageSource):
        self.config, self.num_classes = config, source.num_classes
        if self.num_classes < 2:
            raise InputError(f"--data {config.data}: stage 1 needs at least 2 identities, got {self.num_classes}")
        try:
            check_margin_softmax(config.margins, config.margin_gradient, config.label_smoothing)
        except ValueError as error:
            raise InputError(str(error)) from None

    def forecast(self, world_size: int, precision: str) -> MemoryForecast:
        return forecast(self.config, self.num_classes, world_size, precision)

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """Returns the backbone. Its weights stay contiguous, as DeepSpeed needs them; channels_last images make the
        convolutions so.
        """
        self.centers = ClassCenters(self.num_classes, self.config.z_dim, self.config, runtime, precision)
        return Backbone(self.config.network, self.config.z_dim, self.config.dropout).to(runtime.device)

    def build_optimizer(self, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        return build_optimizer(OptimizerRule.SGD, parameters, self.config, device, momentum=self.config.momentum)

    def make_loader(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> Loader:
        return image_loader(self.config, source, sampler, runtime, self.config.flip)

    def loss(self, engine: Engine, batch: Batch) -> StepResult:
        """Returns the loss of one micro-batch, over all ranks' images."""
        assert self.centers is not None, "build comes first"
        selection = self.centers.select(batch.labels)  # first: what the host waits for is done before the backbone is
        features, _ = engine(batch.images)
        self.centers.lr = engine.learning_rate
        loss, correct = self.centers.loss(features.float(), batch.labels, selection)
        return StepResult(loss, {"accuracy": correct.float().mean()})

    def check_metrics(self, step: int, means: dict[str, float]) -> None:
        """Does nothing: the loss shows everything here."""

    def network(self) -> NetworkShape:
        return NetworkShape(self.config.network, self.config.z_dim)

    def export(self, engine: Engine, folder: Path, is_main: bool, progress: Progress) -> list[Path]:
        """Writes the backbone under its family's names, the class centers as the published code has them; collective.

        Raises:
            OSError: on the main rank, after every collective step, the file that could not be written.
        """
        assert self.centers is not None, "build comes first"
        state = family_state(engine.full_state_dict(), BACKBONES[self.config.network])
        files = [folder / BACKBONE_FILE, folder / CENTERS_FILE]
        self.centers.export(files[1], {"normalization": self.config.normalization, **progress.as_dict()})
        if is_main:
            save_torch_file(state, files[0])
        return files
