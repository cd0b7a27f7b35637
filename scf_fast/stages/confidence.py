"""Stage 2: log kappa from the frozen backbone's last feature map, under the SCF loss."""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scf_fast.config import ConfidenceConfig
from scf_fast.distributed import Runtime
from scf_fast.engine.engine import Engine
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.errors import InputError
from scf_fast.features.open import open_stream, pixel_convention
from scf_fast.features.stream import FeatureBatch
from scf_fast.kernels import inverse_mean_resultant_length, scf_loss
from scf_fast.model import save_model
from scf_fast.networks.backbones import BACKBONES
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.stages import published_files
from scf_fast.stages.base import NetworkShape, Progress, Stage, StepResult
from scf_fast.weights.family_names import family_state
from scf_fast.weights.files import CONFIDENCE_FILE, MODEL_FILE, save_torch_file
from scf_fast.weights.reading import read_weights

log = logging.getLogger(__name__)

_COLLAPSED = 0.01  # of the largest kappa so far, and of the one that fits the cosine


class KappaWatch:
    """Warns once that kappa has collapsed: too large a step has thrown it to where the loss is flat.

    The gradient with respect to log kappa is kappa (A_d(kappa) - cos theta), and vanishes with kappa. The published
    normalizer has no such end: it counts every kappa below 255 (d = 512) as too small.
    """

    def __init__(self, dim: int):
        self._dim, self._highest, self._warned = dim, 0.0, False

    def check(self, step: int, kappa: float, cos_theta: float) -> None:
        """Checks the means of a batch."""
        self._highest = max(self._highest, kappa)
        rho = torch.tensor(max(cos_theta, 0.0), dtype=torch.float64)
        fitting = inverse_mean_resultant_length(rho, self._dim).item()
        if kappa < _COLLAPSED * min(self._highest, fitting) and not self._warned:
            self._warned = True
            log.warning(
                "step %d: kappa has collapsed to %.1e, where its gradient vanishes, though a mean cosine of %.2f asks "
                "for %.0f; it will hardly come back: start again with a lower --lr, with --warmup_epochs, or with "
                "another --initial_kappa",
                step,
                kappa,
                cos_theta,
                fitting,
                extra={"event": "kappa_collapsed", "step": step},
            )


class ConfidenceStage(Stage):
    """Trains a confidence net on the frozen backbone; see :class:`scf_fast.stages.base.Stage`."""

    loss_name = "total_loss"  # as the published code has it
    config: ConfidenceConfig
    centers = None  # they are frozen too

    def __init__(self, config: ConfidenceConfig, source: ImageSource):
        backbone = read_weights(config.saved_bkb, "--saved_bkb")
        self.name, self.z_dim = backbone.network()
        self._watch = KappaWatch(self.z_dim)
        self.backbone_state = backbone.require_backbone()
        for flag, given, actual in (
            ("convf_dim", config.convf_dim, BACKBONES[self.name].convf_dim),
            ("z_dim", config.z_dim, self.z_dim),
        ):
            if given not in (None, actual):
                raise InputError(
                    f"--{flag} must be {actual} for the {self.name} in {config.saved_bkb}, got {given}; leave it out"
                )
        centers_file = read_weights(config.saved_fc, "--saved_fc")
        self.class_centers = centers_file.require_class_centers()
        _check_class_centers(config, self.class_centers, self.z_dim, source.num_classes)
        self._normalization, self._pixels = pixel_convention(config, self.name, centers_file.facts)
        self.config = dataclasses.replace(config, normalization=self._normalization)

    def forecast(self, world_size: int, precision: str) -> None:
        """Returns None: the published net is known to fit, and smaller ones are small."""

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """Returns the confidence net. The frozen backbone and the class centers stay outside the engine."""
        log.info("backbone: %s; pixels: %s, %s", self.name, self.config.normalization, self._pixels)
        self.class_centers = self.class_centers.to(runtime.device)
        self._net_dtype = torch.float32 if precision == "fp32" else None  # None: autocast takes every dtype
        architecture = BACKBONES[self.name]
        net = build_confidence_net(
            self.config.confidence_net, architecture.widths[-1], architecture.map_size, self.config.initial_kappa
        )
        return net.to(runtime.device)

    def build_optimizer(self, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        return build_optimizer(OptimizerRule.ADAM, parameters, self.config, device)

    def network(self) -> NetworkShape:
        return NetworkShape(self.name, self.z_dim)

    def make_loader(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> BatchLoader[Any]:
        """Returns the stream of features."""
        return open_stream(self.config, self.backbone_state, source, sampler, runtime)

    def loss(self, engine: Engine, batch: FeatureBatch) -> StepResult:
        log_kappa = engine(batch.convf.to(self._net_dtype or batch.convf.dtype))
        return self._scf_loss(batch.features, log_kappa, batch.labels)

    def _scf_loss(self, features: torch.Tensor, log_kappa: torch.Tensor, labels: torch.Tensor) -> StepResult:
        """The SCF loss with what the published code logs, under its tags."""
        loss, terms = scf_loss(
            features,
            log_kappa,
            self.class_centers,
            labels,
            radius=self.config.radius,
            normalizer=self.config.normalizer,
            return_terms=True,
        )
        metrics = {
            "kappa": terms.kappa.mean(),
            "neg_kappa_times_cos_theta": terms.l1.mean(),
            "neg_dim_scalar_times_log_kappa": terms.l2.mean(),
            "log_iv_kappa": terms.l3.mean(),
            "cos_theta": terms.cos.mean(),
        }
        return StepResult(loss, metrics, terms.kappa)

    def check_metrics(self, step: int, means: dict[str, float]) -> None:
        """Warns of a kappa that has collapsed."""
        self._watch.check(step, means["kappa"], means["cos_theta"])

    def export(self, engine: Engine, folder: Path, is_main: bool, progress: Progress) -> list[Path]:
        """Writes the confidence net as the published code names it, and the whole model in one file; collective.

        Raises:
            OSError: on the main rank, after every collective step, the file that could not be written.
        """
        net_state, trained_backbone = self._trained_states(engine)
        optimizer_state = published_files.adam_state_dict(engine) if self.config.published_checkpoints else None
        files = [folder / CONFIDENCE_FILE, folder / MODEL_FILE]
        if is_main:
            published_files.write_hparams(self.config, self.z_dim, BACKBONES[self.name].convf_dim)
            save_torch_file({"uncer_net_state_dict": net_state, **progress.as_dict()}, files[0])
            save_model(
                files[1],
                trained_backbone or self.backbone_state,
                net_state,
                radius=self.config.radius,
                normalization=self._normalization,
                normalizer=self.config.normalizer,
                **progress.as_dict(),
            )
            if optimizer_state is not None:
                backbone = family_state(trained_backbone, BACKBONES[self.name]) if trained_backbone else None
                files.append(published_files.write_checkpoint(folder, progress, net_state, optimizer_state, backbone))
        return files

    def _trained_states(self, engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Returns the confidence net and, where it is trained, the backbone; collective."""
        return engine.full_state_dict(), None


def _check_class_centers(config: ConfidenceConfig, class_centers: torch.Tensor, z_dim: int, num_classes: int) -> None:
    """
    Raises:
        InputError: they do not fit the backbone or the identities of the data.
    """
    classes, width = class_centers.shape
    if width != z_dim:
        raise InputError(
            f"--saved_fc {config.saved_fc}: class centers are {width} wide but the backbone's features {z_dim}; both "
            "files must come from the same stage-1 run"
        )
    too_few = num_classes > classes
    if too_few or (num_classes < classes and not config.partial_identities):
        way_out = "" if too_few else ", or give --partial_identities if these are some of them under the same numbers"
        raise InputError(
            f"--data {config.data} has {num_classes} identities but --saved_fc {config.saved_fc} "
            f"{'only ' if too_few else ''}{classes} class centers; train stage 2 on the identities of stage 1{way_out}"
        )
