"""The training loop that both stages share: input, engine, steps, logs, checkpoints, resume."""

import contextlib
import itertools
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from scf_fast import config as configuration
from scf_fast import distributed
from scf_fast.config import Config
from scf_fast.data import epoch_sampler, open_data
from scf_fast.engine.deepspeed_config import load_deepspeed_config, resolve_precision
from scf_fast.engine.engine import average_batchnorm_statistics, initialize_engine, take_step
from scf_fast.engine.optimizers import LearningRate, build_optimizer
from scf_fast.errors import InputError
from scf_fast.networks.flops import peak_flops
from scf_fast.run import checkpoints
from scf_fast.run import folder as run_folder
from scf_fast.run.checkpoints import Checkpoints
from scf_fast.run.reporting import Reporter, StepLines, forget_after, log_to_files, set_up_logging
from scf_fast.run.step_guard import StepGuard, Votes
from scf_fast.run.stop_signal import StopSignal
from scf_fast.run.timing import Breakdown, StepProfile
from scf_fast.stages import published_files
from scf_fast.stages.backbone import BackboneStage
from scf_fast.stages.base import flop_per_image
from scf_fast.stages.confidence import ConfidenceStage
from scf_fast.stages.finetune import FinetuneStage

log = logging.getLogger(__name__)


def _check_world(config: Config, world_size: int) -> None:
    parts = world_size * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise InputError(
            f"--batch_size {config.batch_size} must be divisible by ranks x --gradient_accumulation_steps = "
            f"{world_size} x "
            f"{config.gradient_accumulation_steps}; nearest: {max(1, round(config.batch_size / parts)) * parts}"
        )
    if config.batch_size == parts and (config.stage == "backbone" or config.finetune_bkb):
        raise InputError(
            f"--batch_size must be at least {2 * parts}, two images a rank and micro-batch, got {parts}: the "
            "backbone's BatchNorm needs two"
        )


def _check_data(config: Config, source, state: dict | None) -> None:
    for what, before, now in (
        (("identities", state["num_classes"], source.num_classes), ("images", state["num_images"], len(source)))
        if state
        else ()
    ):
        if before != now:
            raise InputError(
                f"--resume: the checkpoint was trained on {before} {what}, but --data {config.data} now has {now}; "
                "give the data set of that run"
            )


def _open(config: Config):
    """The images to train on, and the stage that will."""
    source = open_data(config)
    kind = BackboneStage if config.stage == "backbone" else FinetuneStage if config.finetune_bkb else ConfidenceStage
    return source, kind(config, source)


@contextlib.contextmanager
def _input_errors():
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


class Incomplete(RuntimeError):
    """Training is over, but what it should leave behind could not be written."""


def train(config: Config) -> str | None:
    """Run one stage to its end, or to the end of the step in which a signal arrives.

    Returns:
        The name of the signal that stopped the run after a checkpoint; None at its end.
    Raises:
        InputError: bad input. Before any training: nothing has been written or deleted then. Or later: data or a cache
            that cannot be read.
        FloatingPointError: the loss stays without a finite value, or the weights have lost theirs.
        Incomplete: the last checkpoint or the exported files could not be written.
    """
    rank, world_size = distributed.environment()
    launched = "RANK" in os.environ
    folder = Path(config.output_dir)
    set_up_logging(rank == 0)
    resumed = source = stage = None
    with contextlib.ExitStack() as held:
        if (
            rank == 0
        ):  # checked by one rank before the group forms: the others must not see files that this one has just written
            with _input_errors():
                if config.deepspeed_config:
                    load_deepspeed_config(config.deepspeed_config)
                locked = folder.is_dir()
                if locked:
                    held.enter_context(run_folder.only_run_in(folder))
                resumed = run_folder.claim(config)
                _check_world(config, world_size)
                source, stage = _open(config)
                _check_data(config, source, resumed[1] if resumed else None)
                epoch_sampler(config, source, rank, world_size)
        runtime = distributed.start()
        resumed = _from_main(resumed)
        for note in published_files.flag_notes(config, launched):
            log.info(note)
        torch.manual_seed(config.seed)  # the same weights on every rank
        precision = resolve_precision(config, runtime.device)
        log.info("precision: %s (%s)", precision, "auto" if config.precision == "auto" else "as given")
        with _input_errors_of_all(runtime):
            if not runtime.is_main:
                source, stage = _open(config)
            module = stage.build(runtime, precision)
            if resumed:
                checkpoints.load_weights(module, folder / run_folder.CHECKPOINTS / resumed[0], resumed[1])
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            optimizer = build_optimizer(stage.optimizer_rule, trained, config, runtime.device)
        with _input_errors_of_all(runtime):  # from here on the folder changes
            if runtime.is_main:
                if config.overwrite and locked:
                    run_folder.empty(folder)
                (folder / run_folder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                if not locked:
                    held.enter_context(run_folder.only_run_in(folder))
                configuration.save(config, folder / run_folder.CONFIG_FILE, run_folder.versions())
        if runtime.is_main:
            log_to_files(folder)
        engine = initialize_engine(module, optimizer, config, runtime, precision)
        torch.manual_seed(config.seed + 1000 * (runtime.rank + 1))  # other dropout on every rank
        stopped_by = _Run(config, runtime, engine, stage, source, folder, precision, resumed).train()
        distributed.finish(engine)
        return stopped_by


@contextlib.contextmanager
def _input_errors_of_all(runtime: distributed.Runtime):
    """What goes wrong on any rank ends all of them, with its message; collective."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * runtime.world_size
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise InputError(found if rank == 0 or found == problem else f"rank {rank}: {found}")


def _from_main(value):
    """The main rank's value, on all; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _StepLog(NamedTuple):
    """What to log of one optimizer step, still on the device: the mean of each metric, and kappa of the last
    micro-batch in stage 2.
    """

    names: list[str]
    values: torch.Tensor
    distribution: torch.Tensor | None

    def averaged(self) -> dict[str, float]:
        """Means over ranks; synchronizes with the device."""
        return dict(zip(self.names, distributed.average_over_ranks(self.values.clone()).tolist()))


class _Run:
    """The steps of one stage, from a checkpoint or from the start."""

    def __init__(
        self,
        config: Config,
        runtime: distributed.Runtime,
        engine,
        stage,
        source,
        folder: Path,
        precision: str,
        resumed: tuple[str, dict] | None,
    ):
        self.precision = precision
        self.config, self.runtime, self.engine, self.stage, self.source, self.folder = (
            config,
            runtime,
            engine,
            stage,
            source,
            folder,
        )
        self.sampler = epoch_sampler(config, source, runtime.rank, runtime.world_size)
        self.per_epoch = self.sampler.batches_per_epoch
        self.schedule = LearningRate(config, engine.basic_optimizer, self.per_epoch)
        self.centers = stage.centers if isinstance(stage, BackboneStage) else None
        background = (
            runtime.device.type == "cuda" if config.background_checkpoints is None else config.background_checkpoints
        )
        self.checkpoints = Checkpoints(
            folder / run_folder.CHECKPOINTS, runtime, config.keep_checkpoints, config.keep_best, background
        )
        self.checkpoints.resume_from(resumed[0] if resumed else None)
        self.guard = StepGuard(
            engine, runtime, config.max_skipped_steps, folder / f"not_finite_rank{runtime.rank}.jsonl"
        )
        self.epoch_loss = torch.zeros(
            2, device=runtime.device, dtype=torch.float64
        )  # sum and number of this epoch's steps
        self.first_step, self.scaler_skips, self.unwritten = 0, 0, None
        if resumed:
            tag, state = resumed
            checkpoints.load(engine, folder / run_folder.CHECKPOINTS / tag, state, self.centers)
            self.first_step = state["step"]
            self.schedule.load_state_dict(state["schedule"])
            self.epoch_loss.copy_(torch.tensor(state["epoch_loss"]))
            log.info(
                "resumed at step %d (epoch %d)%s",
                self.first_step,
                self.first_step // self.per_epoch + 1,
                f", written by {state['world_size']} ranks with ZeRO {state['zero_stage']}"
                if (state["world_size"], state["zero_stage"]) != (runtime.world_size, engine.zero_optimization_stage())
                else "",
                extra={"event": "resume", "step": self.first_step},
            )
        self.last_step = config.epochs * self.per_epoch
        if config.max_steps:
            self.last_step = min(self.last_step, config.max_steps)
        self.clock = Breakdown(runtime.device)
        self.samples = None
        if config.record_samples:
            if runtime.is_main:  # whichever number of ranks has written them
                for path in folder.glob("samples_rank*.jsonl"):
                    forget_after(path, self.first_step)
            dist.barrier()
            self.samples = StepLines(folder / f"samples_rank{runtime.rank}.jsonl")

    def train(self) -> str | None:
        """To the end; the name of the signal that came before it."""
        config, runtime = self.config, self.runtime
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        log.info(
            "stage %s: %d images, %d identities, %d steps an epoch, %.1f M trained parameters, %d rank%s on %s, ZeRO "
            "%d",
            config.stage,
            len(self.source),
            self.source.num_classes,
            self.per_epoch,
            parameters / 1e6,
            runtime.world_size,
            "s" * (runtime.world_size > 1),
            runtime.device.type,
            self.engine.zero_optimization_stage(),
            extra={"event": "start", "step": self.first_step},
        )
        if self.first_step >= self.last_step:
            self._export(self.first_step)  # a run that died after its last checkpoint may not have
            log.info("nothing to do: the run is at step %d of %d", self.first_step, self.last_step)
            self._check_written()
            return None
        with _input_errors():  # a feature cache of something else
            loader = self.stage.make_loader(self.source, self.sampler, runtime)
        batches = (
            batch
            for epoch in itertools.count(self.first_step // self.per_epoch)
            for batch in loader.batches(epoch, start_batch=max(0, self.first_step - epoch * self.per_epoch))
        )
        reporter = Reporter(
            self.folder,
            runtime,
            self.last_step * config.batch_size,
            self.first_step * config.batch_size,
            self.first_step,
            config.tensorboard,
        )
        profile = StepProfile(
            runtime, self.first_step, self.last_step, self.folder / "profile" if config.profile else None
        )
        self.engine.train()
        self.clock = Breakdown(runtime.device)
        with (
            StopSignal() as signal,
            loader,
            contextlib.closing(reporter),
            contextlib.closing(batches),
            contextlib.closing(self.checkpoints),
            contextlib.closing(profile),
            contextlib.closing(self.samples or contextlib.ExitStack()),
        ):
            for step in range(self.first_step + 1, self.last_step + 1):  # counted from 1: the step that is being made
                profile.before(step)
                rate = self.schedule.before_step(step - 1)
                with _input_errors():
                    batch = next(batches)
                self.clock.mark("data")
                result, votes = self._step(batch, bool(signal.name))
                profile.after(step)
                reporter.advance(config.batch_size)
                if self.samples:
                    self.samples.add({"step": step, "images": batch.indices.tolist()})
                try:
                    self.guard.count(votes, step, lambda: self._names(step))  # noqa: B023 -- called before the next step
                except FloatingPointError:  # on all ranks
                    self.checkpoints.finish()
                    raise
                self._log(step, result, votes, rate, reporter)
                if self.checkpoints.pending and not votes.writing:
                    self.checkpoints.finish()
                epoch_ends = step % self.per_epoch == 0
                if (
                    epoch_ends
                    or step == self.last_step
                    or votes.stop
                    or (config.checkpoint_every and step % config.checkpoint_every == 0)
                ):
                    self._save(step, epoch_ends)
                if epoch_ends or step == self.last_step:
                    self._export(step)
                self.clock.mark("checkpoints and logs")
                if votes.stop and step < self.last_step:
                    break
            self.checkpoints.finish()
        stopped_by = _from_main(signal.name or "a signal") if votes.stop and step < self.last_step else None
        self._summarize(step, reporter, loader, profile, stopped_by)
        if stopped_by is None:
            self._check_written()
        return stopped_by

    def _check_written(self) -> None:
        if self.checkpoints.failed:
            raise Incomplete(
                "the last checkpoint could not be written; free some space and --resume, from "
                f"{self.checkpoints.written or 'the beginning'}"
            )
        if self.unwritten:
            raise Incomplete(f"{self.unwritten}; free some space and --resume: only the files are missing")

    def _step(self, batch, stop: bool) -> tuple[_StepLog, Votes]:
        """One optimizer step, or none where the loss has no finite value on any rank."""
        micro_batches, guard, centers = self.config.gradient_accumulation_steps, self.guard, self.centers
        total, names, distribution, votes, applied = 0.0, [], None, None, False
        guard.before_step()
        for number, parts in enumerate(zip(*(tensor.chunk(micro_batches) for tensor in batch)), 1):
            loss, metrics = self.stage.loss(self.engine, type(batch)(*parts))
            distribution = metrics.pop("kappa_distribution", None)
            guard.see(loss)
            names = list(metrics)
            total = total + torch.stack([value.float() for value in metrics.values()])
            if number == micro_batches:
                guard.decide(stop, self.checkpoints.writing)
            self.clock.mark("forward")
            if (
                centers is not None and centers.fused
            ):  # they change in the backward pass: the answer is needed before it
                votes = guard.votes()
                if votes.not_finite:
                    return _StepLog(names, total, distribution), votes
            self.engine.backward(loss)
            self.clock.mark("backward")
            votes = guard.votes() if number == micro_batches else None
            applied = take_step(self.engine)
        if centers is not None:
            centers.step(applied and not votes.not_finite)
        if not votes.not_finite:
            self.epoch_loss += torch.stack([total[0] / micro_batches, total.new_ones(())])
            self.scaler_skips += not applied
        elif applied:
            self.engine.skipped_steps += 1  # DeepSpeed does not know that the optimizer did nothing
        self.clock.mark("optimizer")
        return _StepLog(names, total / micro_batches, distribution), votes

    def _names(self, step: int) -> list[str]:
        return [self.source.name(int(i)) for i in self.sampler.indices(*divmod(step - 1, self.per_epoch))]

    def _log(self, step: int, result: _StepLog, votes: Votes, rate: float, reporter: Reporter) -> None:
        if votes.not_finite:
            return
        plateau = self.schedule.plateau
        due = step % self.config.log_every == 0 or step in (self.first_step + 1, self.last_step)
        means = result.averaged() if due or plateau is not None else None
        if plateau is not None:
            plateau.step(means[result.names[0]])
        if due:
            reporter.metrics(step, means, rate, result.distribution)
            self.stage.look(step, means)
            self.clock.collect()

    def _save(self, step: int, epoch_ends: bool) -> None:
        average_batchnorm_statistics(self.engine.module)
        total, count = distributed.average_over_ranks(self.epoch_loss).tolist()
        if epoch_ends:
            self.epoch_loss.zero_()
        self.checkpoints.save(
            self.engine,
            {
                "step": step,
                "schedule": self.schedule.state_dict(),
                "num_classes": self.source.num_classes,
                "num_images": len(self.source),
                "metric": total / count if epoch_ends and count else None,
                "epoch_loss": self.epoch_loss.tolist(),
            },
            self.centers,
        )

    def _export(self, step: int) -> None:
        try:
            files = self.stage.export(
                self.engine,
                self.folder,
                self.runtime.is_main,
                {"epoch": (step - 1) // self.per_epoch, "global_step": step - 1},
            )
        except OSError as error:
            self.unwritten = f"{error.filename or self.folder}: {error.strerror or error}"
            log.error(
                "the trained weights could not be written (%s); training goes on",
                self.unwritten,
                extra={"event": "export_failed", "step": step},
            )
            return
        self.unwritten = None
        log.info("wrote %s", ", ".join(map(str, files)), extra={"event": "export", "step": step})

    def _summarize(self, step: int, reporter: Reporter, loader, profile: StepProfile, stopped_by: str | None) -> None:
        self.clock.collect()
        seconds = sum(self.clock.seconds.values())
        self.clock.split("data", loader.seconds)
        broken = torch.tensor(float(loader.count_broken()), device=self.runtime.device)
        counts = {
            "steps": step - self.first_step,
            "skipped_not_finite": self.guard.skipped,
            "skipped_by_loss_scale": self.scaler_skips,
            "broken_images": round(distributed.average_over_ranks(broken).item() * self.runtime.world_size),
        }
        lost = ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "steps"
        )
        rate = counts["steps"] * self.config.batch_size / seconds
        peak = (
            peak_flops(torch.cuda.get_device_name())
            if self.runtime.device.type == "cuda" and self.precision != "fp32"
            else None
        )
        flops = rate * flop_per_image(self.config, *self.stage.network(), self.source.num_classes)
        floor = flops / (peak * self.runtime.world_size) if peak else None
        communication = (
            ""
            if profile.communication is None
            else f"; communication {100 * profile.communication:.0f} % of a step, partly beside these"
        )
        log.info(
            "%s: %d steps in %s, %.0f img/s%s%s; %s%s",
            f"stopped by {stopped_by} after step {step}, --resume continues" if stopped_by else "done",
            counts["steps"],
            tqdm.format_interval(seconds),
            rate,
            f" ({100 * floor:.0f} % of the device's peak)" if peak else "",
            f"; {lost}" if lost else "",
            self.clock,
            communication,
            extra={
                "event": "stopped" if stopped_by else "done",
                "step": step,
                "counts": counts,
                "seconds": {part: round(value, 3) for part, value in self.clock.seconds.items()},
                "rates": {
                    "images_per_second": rate,
                    "flops": flops,
                    "share_of_peak": floor,
                    "communication": profile.communication,
                },
            },
        )
