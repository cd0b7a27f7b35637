"""Stage 2: confidence nets on the frozen backbone's last feature map, under one objective or several."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.config import ConfidenceConfig
from scf_fast.data import epoch_sampler, held_out_sampler
from scf_fast.distributed import Runtime
from scf_fast.engine.engine import Engine
from scf_fast.engine.optimizers import OptimizerRule, build_optimizer
from scf_fast.errors import InputError
from scf_fast.features.open import open_stream, pixel_convention
from scf_fast.model import save_model
from scf_fast.networks.backbones import BACKBONES
from scf_fast.networks.confidence import ConfidenceNet, build_confidence_net
from scf_fast.objectives import Density, Objective
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.stages import published_files
from scf_fast.stages.base import NetworkShape, Progress, Stage, StepResult
from scf_fast.stages.criteria import Criterion, doubt_about, make_criterion
from scf_fast.stages.pairs import PairBatch, PairLoader, PairMicroBatch, divide, share_of_sums
from scf_fast.stages.start import best_constant, check_cosine, genuine_cosine, mean_over_ranks, rate_limit
from scf_fast.stages.validation import Prediction, measure_people
from scf_fast.weights.family_names import StateDict, family_state
from scf_fast.weights.files import CONFIDENCE_FILE, MODEL_FILE, save_torch_file
from scf_fast.weights.reading import read_noted_facts, read_weights

log = logging.getLogger(__name__)

_START_IMAGES = 1024  # that a start is measured on
_LIMIT_IMAGES = 64  # of a rank, that the learning rate's limit is measured on


class SeveralNets(nn.ModuleDict):
    """Confidence nets that train together, by the names of their objectives."""

    def forward(self, convf: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, C, H, W) -> what each net predicts, in order."""
        return tuple(net(convf) for net in self.values())


class ConfidenceStage(Stage):
    """Trains a confidence net on the frozen backbone, or one for each of several objectives; see
    :class:`scf_fast.stages.base.Stage`.

    Of several objectives each net trains as it would alone: it starts from the same weights, the loss is the sum, so
    that its gradient is that of its own, and the optimizer is elementwise.
    """

    loss_name = "total_loss"  # as the published code has it
    config: ConfidenceConfig
    centers = None  # they are frozen too

    def __init__(self, config: ConfidenceConfig, source: ImageSource):
        backbone = read_weights(config.saved_bkb, "--saved_bkb")
        self.name, self.z_dim = backbone.network()
        self.backbone_state = backbone.require_backbone()
        for flag, given, actual in (
            ("convf_dim", config.convf_dim, BACKBONES[self.name].convf_dim),
            ("z_dim", config.z_dim, self.z_dim),
        ):
            if given not in (None, actual):
                raise InputError(
                    f"--{flag} must be {actual} for the {self.name} in {config.saved_bkb}, got {given}; leave it out"
                )
        centers_file = read_weights(config.saved_fc, "--saved_fc") if config.saved_fc else None
        facts = read_noted_facts(backbone, config.saved_bkb) if centers_file is None else centers_file.facts
        self._class_centers: torch.Tensor | None = None  # pairs need none
        if not config.is_pairwise:
            assert centers_file is not None, "the configuration has asked for it"
            self._class_centers = centers_file.require_class_centers()
            _check_class_centers(config, self._class_centers, self.z_dim, source.num_classes)
        self._normalization, self._pixels = pixel_convention(config, self.name, facts)
        self.config = dataclasses.replace(config, normalization=self._normalization)
        self._labels = source.labels
        self._criteria: dict[str, Criterion] = {}
        self._opened: BatchLoader[Any] | None = None  # by ``prepare``, for training
        self._open_held_out: Callable[[], BatchLoader[Any]] | None = None  # the images of --validation

    def forecast(self, world_size: int, precision: str) -> None:
        """Returns None: the published net is known to fit, and smaller ones are small."""

    def build(self, runtime: Runtime, precision: str) -> nn.Module:
        """Returns the confidence net, or several. The frozen backbone and the class centers stay outside the engine."""
        log.info("backbone: %s; pixels: %s, %s", self.name, self.config.normalization, self._pixels)
        centers = None if self._class_centers is None else self._class_centers.to(runtime.device)
        self._net_dtype = torch.float32 if precision == "fp32" else None  # None: autocast takes every dtype
        objectives = self.config.objectives
        self._criteria = {o.value: make_criterion(o, self.config, self.z_dim, centers) for o in objectives}
        nets = {objective.value: self._build_net(objective) for objective in objectives}
        return (nets[objectives[0].value] if len(nets) == 1 else SeveralNets(nets)).to(runtime.device)

    def _build_net(self, objective: Objective) -> ConfidenceNet:
        architecture, start = BACKBONES[self.name], self.config.start
        if start is not None and objective.density is Density.GAUSSIAN:
            start = 1 / start  # the net predicts a variance
        torch.manual_seed(self.config.seed)  # it starts as it would alone
        net = build_confidence_net(
            self.config.confidence_net,
            architecture.widths[-1],
            architecture.map_size,
            start,
            outputs=self.config.outputs(objective, self.z_dim),
        )
        net.floor_passes_gradient = objective is Objective.SCF and self.config.slope == "bounded"
        return net

    def prepare(self, module: nn.Module, source: ImageSource, runtime: Runtime) -> None:
        """Starts each net at the kappa or variance that fits the first batches best, and measures the learning rate
        that its first step bears.
        """
        config = self.config
        is_auto = config.initial_kappa == "auto"
        is_limited = bool(config.max_first_step) and config.update_rule == "adam"
        if not (is_auto or is_limited):
            return
        sampler = epoch_sampler(config, source, runtime.rank, runtime.world_size)
        loader = self.make_loader(source, sampler, runtime)
        try:
            batches = range(min(sampler.batches_per_epoch, -(-_START_IMAGES // sampler.global_batch_size)))
            cosines, inputs = [], None
            with contextlib.closing(loader.batches(0)) as made:
                for _, batch in zip(batches if is_auto else range(1), made):
                    images = batch.inputs if isinstance(batch, PairBatch) else batch
                    features, convf = self._frozen_outputs(module, images)
                    cosines.append(self._own_cosine(features, images.labels))
                    inputs = convf if inputs is None else inputs
            assert inputs is not None, "an epoch has a batch"
            if is_auto:
                self._start_at(module, mean_over_ranks(torch.cat(cosines)))
            if is_limited:
                self._limit_rate(module, inputs[:_LIMIT_IMAGES].float())
        except BaseException:
            loader.close()
            raise
        self._opened = loader

    def _nets(self, module: nn.Module) -> dict[Objective, ConfidenceNet]:
        """Returns the confidence net of each objective."""
        nets = module.values() if isinstance(module, SeveralNets) else [module]
        return {objective: cast(ConfidenceNet, net) for objective, net in zip(self.config.objectives, nets)}

    def _frozen_outputs(self, module: nn.Module, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features (B, z_dim) and the last map of a batch, before any training."""
        return inputs.features, inputs.convf

    def _own_cosine(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the cosine of images with what they are held against."""
        mu = F.normalize(features.float())
        if self._class_centers is None:
            return genuine_cosine(mu, labels)
        centers = self._class_centers.to(labels.device)[labels]
        return F.cosine_similarity(mu, centers.float())

    def _start_at(self, module: nn.Module, cosine: float) -> None:
        config = self.config
        centers = f"--saved_fc {config.saved_fc}" if self._class_centers is not None else f"--data {config.data}"
        check_cosine(cosine, centers)
        for objective, net in self._nets(module).items():
            value = best_constant(objective, cosine, self.z_dim, config.normalizer == "published")
            net.start_at(value)
            log.info(
                "%s starts at a %s of %.4g, which fits the mean cosine %.3f of the first batches best",
                objective.title,
                "kappa" if objective.density is Density.VMF else "variance",
                value,
                cosine,
                extra={"event": "initial_kappa"},
            )

    def _limit_rate(self, module: nn.Module, convf: torch.Tensor) -> None:
        assert self.config.max_first_step is not None, "resolved"
        self.rate_limit = min(
            rate_limit(net, net.parameters(), convf, self.config.max_first_step) for net in self._nets(module).values()
        )
        if self.rate_limit < self.config.lr:
            log.warning(
                "--lr %g is lowered to %.3g: a first step of Adam would move log kappa by up to %.3g, and "
                "--max_first_step is %g",
                self.config.lr,
                self.rate_limit,
                self.config.lr / self.rate_limit * self.config.max_first_step,
                self.config.max_first_step,
                extra={"event": "rate_limited"},
            )

    def build_optimizer(self, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        return build_optimizer(OptimizerRule(self.config.update_rule), parameters, self.config, device)

    def network(self) -> NetworkShape:
        return NetworkShape(self.name, self.z_dim)

    def make_loader(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> BatchLoader[Any]:
        """Returns the stream of features, of pairs with what makes a pair."""
        opened, self._opened = self._opened, None
        if opened is not None:
            return opened
        self._stream = open_stream(self.config, self.backbone_state, source, sampler, runtime)
        self._hold_out(source, runtime)
        return self.pair_up(self._stream, sampler)

    def _hold_out(self, source: ImageSource, runtime: Runtime) -> None:
        """Prepares for validation."""
        if self.config.validation:
            sampler = held_out_sampler(self.config, source, runtime.rank, runtime.world_size)
            self._open_held_out = lambda: self.pair_up(self.load_held_out(source, sampler, runtime), sampler)

    def load_held_out(self, source: ImageSource, sampler: Sampler, runtime: Runtime) -> BatchLoader[Any]:
        """Returns what :meth:`loss` takes of the images held out, none of them mirrored."""
        return self._stream.of(sampler)

    def pair_up(self, loader: BatchLoader[Any], sampler: Sampler) -> BatchLoader[Any]:
        """Returns the loader, of pairs with what makes a pair."""
        return PairLoader(loader, sampler, self._labels) if isinstance(sampler, PairSampler) else loader

    def divide(self, batch: Any, count: int) -> Sequence[Any]:
        return divide(batch, count) if isinstance(batch, PairBatch) else super().divide(batch, count)

    def loss(self, engine: Engine, batch: Any) -> StepResult:
        """Returns the loss of one micro-batch: of features, of images where they make the features, or of pairs."""
        inputs, share = (batch.inputs, batch.share) if isinstance(batch, PairMicroBatch) else (batch, None)
        features, predicted = self._forward(engine, inputs)
        parameters = predicted if isinstance(predicted, tuple) else (predicted,)
        results = {
            name: criterion.loss(features, parameter, inputs.labels, share)
            for (name, criterion), parameter in zip(self._criteria.items(), parameters, strict=True)
        }
        for name, result in results.items():
            (self._criteria[name].newest,) = result.distributions.values()
        return next(iter(results.values())) if len(results) == 1 else _joined(results, self.loss_name)

    def _forward(self, engine: Engine, inputs: Any) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...]]:
        """Returns features (B, z_dim), and what the net predicts, or each of several."""
        return inputs.features, engine(inputs.convf.to(self._net_dtype or inputs.convf.dtype))

    def check_metrics(self, step: int, means: dict[str, float]) -> None:
        """Warns of a kappa or a variance that has collapsed."""
        for name, criterion in self._criteria.items():
            prefix = f"{name}/" if len(self._criteria) > 1 else ""
            criterion.check(
                step, {key.removeprefix(prefix): value for key, value in means.items() if key.startswith(prefix)}
            )

    def validate(self, engine: Engine, runtime: Runtime) -> dict[str, float] | None:
        if self._open_held_out is None:
            return None

        def predict(batch: Any) -> Prediction:
            inputs, share = (batch.inputs, share_of_sums(batch)) if isinstance(batch, PairBatch) else (batch, None)
            features, predicted = self._forward(engine, inputs)
            parameters = predicted if isinstance(predicted, tuple) else (predicted,)
            people = torch.from_numpy(self._labels[inputs.indices.numpy()])
            return Prediction(features, parameters, inputs.labels, people, share)

        engine.eval()
        with (
            torch.no_grad(),
            contextlib.closing(self._open_held_out()) as loader,
            contextlib.closing(loader.batches(0)) as batches,
        ):
            found = measure_people(batches, predict, self._criteria, runtime)
        engine.train()
        return found

    def export(self, engine: Engine, folder: Path, is_main: bool, progress: Progress) -> list[Path]:
        """Writes the confidence net as the published code names it, and the whole model in one file; each of several
        into a folder of its own, named by its objective. Collective.

        Raises:
            OSError: on the main rank, after every collective step, the file that could not be written.
        """
        state, trained_backbone = self._trained_states(engine)
        optimizer_state = published_files.adam_state_dict(engine) if self.config.published_checkpoints else None
        objectives, files = self.config.objectives, []
        for objective in objectives:
            net_state, own = state, folder
            if len(objectives) > 1:
                net_state, own = states_of(state, objective.value), folder / objective.value
            files += [own / CONFIDENCE_FILE, own / MODEL_FILE]
            if is_main:
                self._save(net_state, trained_backbone, objective, own, progress, self._doubt(objective))
        if is_main and objectives == (Objective.SCF,):
            published_files.write_hparams(self.config, self.z_dim, BACKBONES[self.name].convf_dim)
        if is_main and optimizer_state is not None:
            backbone = family_state(trained_backbone, BACKBONES[self.name]) if trained_backbone else None
            files.append(published_files.write_checkpoint(folder, progress, state, optimizer_state, backbone))
        return files

    def _save(
        self,
        net_state: StateDict,
        trained_backbone: StateDict | None,
        objective: Objective,
        folder: Path,
        progress: Progress,
        warning: str | None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        content = {"uncer_net_state_dict": net_state, "objective": objective.value, **progress.as_dict()}
        if warning is not None:
            content["warning"] = warning
        save_torch_file(content, folder / CONFIDENCE_FILE)
        save_model(
            folder / MODEL_FILE,
            trained_backbone or self.backbone_state,
            net_state,
            radius=self.config.radius,
            normalization=self._normalization,
            normalizer=self.config.normalizer if objective is Objective.SCF else None,
            objective=objective,
            warning=warning,
            **progress.as_dict(),
        )

    def _doubt(self, objective: Objective) -> str | None:
        """Returns what speaks against a net by the images of the newest batch, and logs it."""
        newest = self._criteria[objective.value].newest
        doubt = None if newest is None else doubt_about(newest)
        if doubt is not None:
            log.warning(
                "%s: %s; the model is written with this warning", objective.title, doubt, extra={"event": "doubt"}
            )
        return doubt

    def _trained_states(self, engine: Engine) -> tuple[StateDict, StateDict | None]:
        """Returns the confidence net, or several, and the backbone where it is trained; collective."""
        return engine.full_state_dict(), None


def states_of(state: StateDict, part: str) -> StateDict:
    """Returns the state_dict of a part of a module, out of the module's."""
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


def _joined(results: dict[str, StepResult], loss_name: str) -> StepResult:
    """Returns the sum of the losses, with what each net logs under the name of its objective."""
    metrics: dict[str, torch.Tensor] = {}
    distributions: dict[str, torch.Tensor] = {}
    for name, result in results.items():
        own = {loss_name: result.loss.detach(), **result.metrics}
        metrics |= {f"{name}/{key}": value for key, value in own.items()}
        distributions |= {f"{name}/{key}": value for key, value in result.distributions.items()}
    return StepResult(torch.stack([result.loss for result in results.values()]).sum(), metrics, distributions)


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
