"""The protocol between trainer and stages, and the values that pass between them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from scf_fast.config import BackboneConfig, ConfidenceConfig, Config
from scf_fast.distributed import Runtime
from scf_fast.engine.class_centers import ClassCenters
from scf_fast.engine.engine import Engine
from scf_fast.networks.flops import network_counts
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.stages.memory_forecast import MemoryForecast

VALIDATION_LOSS = "validation/loss"


@dataclass(frozen=True)
class StepResult:
    """Outcome of one micro-batch, all on the device.

    Attributes:
        loss: scalar, mean over the images or pairs, differentiable.
        metrics: further scalars to log, by name.
        distributions: (B,) of these images, positive, by name: the kappa or precision that the stage predicts.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    distributions: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far a run is, counted from 0 as every family's checkpoints do."""

    epoch: int
    global_step: int

    def as_dict(self) -> dict[str, int]:
        """Returns the entries of a checkpoint file."""
        return {"epoch": self.epoch, "global_step": self.global_step}


@dataclass(frozen=True)
class NetworkShape:
    """Name and embedding width d of a backbone."""

    name: str
    embedding_dim: int


class Stage(Protocol):
    """One kind of training: what is trained, on which batches, under which loss, and what it leaves behind.

    Constructing a stage checks its inputs; nothing is allocated before :meth:`build`.

    Attributes:
        config: the options, with what the inputs have decided filled in.
        loss_name: name of the loss in logs, metrics and TensorBoard.
        centers: class centers trained beside the engine, from :meth:`build` on; None where there are none.
    """

    config: Config
    loss_name: str
    centers: ClassCenters | None

    def forecast(self, world_size: int, precision: str) -> MemoryForecast | None:
        """Returns what a rank will take in memory; None where nothing is known beforehand."""
        ...

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """Returns the module for the engine, on the rank's device."""
        ...

    def build_optimizer(self, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        """Returns the optimizer of the trained parameters.

        Raises:
            InputError: ``--optimizer`` names one that cannot be used here.
        """
        ...

    def make_loader(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> BatchLoader[Any]:
        """Returns the loader of this rank's batches; collective.

        Raises:
            InputError: a feature cache of something else.
        """
        ...

    rate_limit: float | None = None  # the highest learning rate that the untrained network bears, after ``prepare``

    def prepare(self, module: nn.Module, source: ImageSource, runtime: Runtime) -> None:
        """Settles, from the first batches, what training starts with; collective. Not for a run that resumes.

        Raises:
            InputError: training cannot start from these data.
        """
        return None  # a stage that measures nothing

    def divide(self, batch: Any, count: int) -> Sequence[Any]:
        """Divides a batch of the loader into micro-batches; collective."""
        return [type(batch)(*parts) for parts in zip(*(tensor.chunk(count) for tensor in batch))]

    def loss(self, engine: Engine, batch: Any) -> StepResult:
        """Returns the loss of one micro-batch; over micro-batches and ranks it averages to that of the global batch."""
        ...

    def check_metrics(self, step: int, means: dict[str, float]) -> None:
        """Looks at the logged means of a step and warns of what the loss does not show."""
        ...

    def network(self) -> NetworkShape:
        """Returns which backbone the stage has."""
        ...

    def validate(self, engine: Engine, runtime: Runtime) -> dict[str, float] | None:
        """Returns what people held out say of the weights, by name, :data:`VALIDATION_LOSS` among it; collective, the
        same on every rank. None where nobody is held out.
        """
        return None

    def export(self, engine: Engine, folder: Path, is_main: bool, progress: Progress) -> list[Path]:
        """Writes what the stage leaves behind and returns the files; collective.

        Raises:
            OSError: on the main rank, after every collective step, the file that could not be written.
        """
        ...


def flop_per_image(config: Config, network: NetworkShape, num_classes: int) -> int:
    """Returns the FLOP of a training step, an image.

    A backward pass costs two forward passes, the margin softmax four products of an image with all class centers in it.
    A frozen backbone counts once an image, with a feature cache not at all.
    """
    if isinstance(config, BackboneConfig):
        backbone, *_ = network_counts(network.name, None, network.embedding_dim)
        return 3 * backbone + round(config.sample_rate * 4 * 2 * num_classes * network.embedding_dim)
    assert isinstance(config, ConfidenceConfig), "the stages have no other"
    backbone, *_ = network_counts(network.name, None, network.embedding_dim)
    nets = 0
    for objective in config.objectives:
        outputs = config.outputs(objective, network.embedding_dim)
        nets += network_counts(network.name, config.confidence_net, network.embedding_dim, outputs).confidence_flop
    return (3 if config.finetune_bkb else 0 if config.feature_cache else 1) * backbone + 3 * nets
