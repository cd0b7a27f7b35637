"""Stage 2: log kappa from the frozen backbone's last feature map, under the SCF loss."""

import logging
from pathlib import Path

import torch
from torch import nn

from scf_fast.config import Config
from scf_fast.distributed import Runtime
from scf_fast.engine.engine import full_state_dict
from scf_fast.errors import InputError
from scf_fast.features.open import open_stream, pixel_convention
from scf_fast.features.stream import FeatureBatch, FeatureStream
from scf_fast.kernels import inverse_mean_resultant_length, scf_loss
from scf_fast.model import save_model
from scf_fast.networks.backbones import BACKBONES
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.networks.families import family_state
from scf_fast.stages import published_files
from scf_fast.weights.files import CONFIDENCE_FILE, MODEL_FILE, save_torch_file
from scf_fast.weights.reading import read_weights

log = logging.getLogger(__name__)

_COLLAPSED = 0.01  # of the kappa that training began with, and of the one that fits the cosine


class KappaWatch:
    """Says once in the log that kappa has collapsed: too large a step has thrown it to where the loss is flat.

    The gradient with respect to log kappa is kappa (A_d(kappa) - cos theta), and vanishes with kappa. The published
    normalizer has no such
    end: it counts every kappa below 255 (d = 512) as too small.
    """

    def __init__(self, dim: int):
        self._dim, self._highest, self._said = dim, 0.0, False

    def look(self, step: int, kappa: float, cos_theta: float) -> None:
        """At means over a batch."""
        self._highest = max(self._highest, kappa)
        fitting = inverse_mean_resultant_length(
            torch.tensor(max(cos_theta, 0.0), dtype=torch.float64), self._dim
        ).item()
        if kappa < _COLLAPSED * min(self._highest, fitting) and not self._said:
            self._said = True
            log.warning(
                "step %d: kappa has collapsed to %.1e, where its gradient vanishes, though a mean cosine of %.2f asks "
                "for %.0f; it will hardly "
                "come back: start anew with a lower --lr, with --warmup_epochs, or with another --initial_kappa",
                step,
                kappa,
                cos_theta,
                fitting,
                extra={"event": "kappa_collapsed", "step": step},
            )


class ConfidenceStage:
    """What :mod:`scf_fast.trainer` needs to train stage 2."""

    optimizer_rule = "adam"

    def __init__(self, config: Config, source):
        self.config = config
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
        fc = read_weights(config.saved_fc, "--saved_fc")
        self.class_centers = fc.require_class_centers()
        classes, width = self.class_centers.shape
        if width != self.z_dim:
            raise InputError(
                f"--saved_fc {config.saved_fc}: class centers are {width} wide but the backbone's features "
                f"{self.z_dim}; "
                "both files must come from the same stage-1 run"
            )
        if source.num_classes > classes or (source.num_classes < classes and not config.partial_identities):
            way_out = (
                ""
                if source.num_classes > classes
                else ", or give --partial_identities if these are some of them under the same numbers"
            )
            only = "only " if source.num_classes > classes else ""
            raise InputError(
                f"--data {config.data} has {source.num_classes} identities but --saved_fc {config.saved_fc} "
                f"{only}{classes} class centers; "
                f"train stage 2 on the identities of stage 1{way_out}"
            )
        # The resolved value goes into the configuration, as every other default does.
        config.normalization, self._pixels = pixel_convention(config, self.name, fc.facts)

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """The module for the engine: the confidence net alone. The frozen backbone and the class centers stay
        outside.
        """
        log.info("backbone: %s; pixels: %s, %s", self.name, self.config.normalization, self._pixels)
        self.class_centers = self.class_centers.to(runtime.device)
        self.net_dtype = torch.float32 if precision == "fp32" else None  # None: autocast takes what comes
        architecture = BACKBONES[self.name]
        net = build_confidence_net(
            self.config.confidence_net, architecture.widths[-1], architecture.map_size, self.config.initial_kappa
        )
        return net.to(runtime.device)

    def network(self) -> tuple[str, int]:
        """Name and embedding width of the backbone."""
        return self.name, self.z_dim

    def make_loader(self, source, sampler, runtime: Runtime) -> FeatureStream:
        """Batches of features."""
        return open_stream(self.config, self.backbone_state, source, sampler, runtime)

    def loss(self, engine, batch: FeatureBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch and what to log of it, all on the device. Tags are those of the published code."""
        features, convf, labels, _ = batch
        return self._scf_loss(features, engine(convf.to(self.net_dtype or convf.dtype)), labels)

    def _scf_loss(self, features, log_kappa, labels) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, terms = scf_loss(
            features,
            log_kappa,
            self.class_centers,
            labels,
            radius=self.config.radius,
            normalizer=self.config.normalizer,
            return_terms=True,
        )
        return loss, {
            "total_loss": loss.detach(),
            "kappa": terms.kappa.mean(),
            "neg_kappa_times_cos_theta": terms.l1.mean(),
            "neg_dim_scalar_times_log_kappa": terms.l2.mean(),
            "log_iv_kappa": terms.l3.mean(),
            "cos_theta": terms.cos.mean(),
            "kappa_distribution": terms.kappa,
        }

    def look(self, step: int, means: dict[str, float]) -> None:
        """At what is logged of a step."""
        self._watch.look(step, means["kappa"], means["cos_theta"])

    def export(self, engine, folder: Path, is_main: bool, progress: dict) -> list[Path]:
        """Write the confidence net as the published code names it, and the whole model in one file; collective.

        Raises:
            OSError: on the main rank, after every collective step, what could not be written.
        """
        net_state, trained_backbone = self._trained_states(engine)
        optimizer_state = published_files.adam_state_dict(engine) if self.config.published_checkpoints else None
        files = [folder / CONFIDENCE_FILE, folder / MODEL_FILE]
        if is_main:
            published_files.write_hparams(self.config, self.z_dim, BACKBONES[self.name].convf_dim)
            save_torch_file({"uncer_net_state_dict": net_state, **progress}, files[0])
            save_model(
                files[1],
                trained_backbone or self.backbone_state,
                net_state,
                radius=self.config.radius,
                normalization=self.config.normalization,
                normalizer=self.config.normalizer,
                **progress,
            )
            if optimizer_state is not None:
                backbone = family_state(trained_backbone, BACKBONES[self.name]) if trained_backbone else None
                files.append(published_files.write_checkpoint(folder, progress, net_state, optimizer_state, backbone))
        return files

    def _trained_states(self, engine) -> tuple[dict, dict | None]:
        """Confidence net and, where it is trained, backbone; collective."""
        return full_state_dict(engine, engine.module), None
