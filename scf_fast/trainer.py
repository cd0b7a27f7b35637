"""The order of a training run, whichever its stage: inputs, engine, steps, logs, checkpoints, resume."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scf_fast import distributed, start_up
from scf_fast.config import ConfidenceConfig, Config
from scf_fast.data import describe_groups, epoch_sampler
from scf_fast.distributed import Runtime
from scf_fast.engine.deepspeed_config import resolve_precision
from scf_fast.engine.dropped import Dropped
from scf_fast.engine.engine import Engine
from scf_fast.engine.learning_rate import LearningRate
from scf_fast.errors import Incomplete
from scf_fast.networks.flops import peak_flops
from scf_fast.pipelines.loading.protocol import BatchLoader
from scf_fast.run import checkpoints, cluster_checks, same_inputs
from scf_fast.run import folder as run_folder
from scf_fast.run.checkpoints import Checkpoints, ResumePoint
from scf_fast.run.line_files import StepLines, forget_after
from scf_fast.run.patience import Patience
from scf_fast.run.reporting import Reporter, log_to_files, set_up_logging
from scf_fast.run.run_state import RunState
from scf_fast.run.same_folder import SameFolder
from scf_fast.run.step_guard import StepGuard, Votes
from scf_fast.run.step_outcome import StepOutcome
from scf_fast.run.stop_signal import StopSignal
from scf_fast.run.summary import log_summary
from scf_fast.run.timing import Breakdown, StepProfile
from scf_fast.stages.base import VALIDATION_LOSS, Progress, StepResult, flop_per_image
from scf_fast.stages.inputs import Inputs
from scf_fast.stages.published_files import flag_notes

log = logging.getLogger(__name__)


def train(config: Config) -> str | None:
    """Runs one stage to its end, or to the end of the step in which a signal arrives.

    Returns:
        The name of the signal that stopped the run after a checkpoint; None at its end.
    Raises:
        InputError, OSError: bad input. Before any training: nothing has been written or deleted then. Or later: data or
            a cache that cannot be read.
        FloatingPointError: steps in a row, or an epoch, have changed no weight; or the weights have lost their finite
            values.
        Incomplete: the last checkpoint or the exported files could not be written.
    """
    place = distributed.find_place()
    set_up_logging(place.rank == 0)
    if place.restarts:  # by the launcher, with the flags of the first start
        config = dataclasses.replace(config, resume=True, overwrite=False)
    with distributed.ending_together():
        runtime = distributed.start(config.timeout)
        distributed.mark("the start: inputs, weights, checks")
        return _train(config, runtime, place.launcher != "python")


def _train(config: Config, runtime: Runtime, launched: bool) -> str | None:
    """Does what :func:`train` does, as one of the ranks that have met."""
    folder = Path(config.output_dir)
    with contextlib.ExitStack() as held:
        locked, point, inputs = start_up.claim_and_open(config, runtime, held)
        for note in flag_notes(config, launched):
            log.info(note)
        torch.manual_seed(config.seed)  # the same weights on every rank
        precision = resolve_precision(config, runtime.device)
        log.info("precision: %s (%s)", precision, "auto" if config.precision == "auto" else "as given")
        inputs = start_up.open_in_turn(config, runtime, point, inputs)
        found = cluster_checks.check_nodes(config, inputs.source, runtime)
        with distributed.shared_input_errors(runtime):
            if inputs.memory is not None:
                log.info("%s", inputs.memory)
            module = inputs.stage.build(runtime, precision)
            if point:
                checkpoints.load_weights(module, point)
            elif not config.check:
                inputs.stage.prepare(module, inputs.source, runtime)
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            optimizer = inputs.stage.build_optimizer(trained, runtime.device)
            needed = cluster_checks.checkpoint_bytes(optimizer, inputs.stage.centers)
            if runtime.is_main:
                found.append(cluster_checks.check_space(config, needed))
        if config.check:
            for line in found:
                log.info("checked: %s", line)
            log.info("all is ready; without --check this run %s", f"goes on from {point.tag}" if point else "starts")
            return None
        config = inputs.stage.config  # the inputs have settled the rest of it
        with distributed.shared_input_errors(runtime):  # from here on the folder changes
            if runtime.is_main:
                held.enter_context(run_folder.prepare(config, locked))
                same_inputs.note(config, inputs.source)
        if runtime.is_main:
            log_to_files(folder)
        engine = Engine(module, optimizer, config, runtime, precision)
        torch.manual_seed(config.seed + 1000 * (runtime.rank + 1))  # other dropout on every rank
        stopped_by = _Run(runtime, engine, inputs, folder, precision, point).train()
        engine.close()
        return stopped_by


class _Run:
    """The steps of one stage, from a checkpoint or from the start."""

    def __init__(
        self,
        runtime: Runtime,
        engine: Engine,
        inputs: Inputs,
        folder: Path,
        precision: str,
        point: ResumePoint | None,
    ):
        self.runtime, self.engine, self.folder, self.precision = runtime, engine, folder, precision
        self.source, self.stage, self.config = inputs.source, inputs.stage, inputs.stage.config
        config = self.config
        self.sampler = epoch_sampler(config, self.source, runtime.rank, runtime.world_size)
        self.per_epoch = self.sampler.batches_per_epoch
        self.schedule = LearningRate(config, engine.optimizer, self.per_epoch, self.stage.rate_limit)
        in_background = config.background_checkpoints
        self.checkpoints = Checkpoints(
            folder / run_folder.CHECKPOINTS,
            runtime,
            config.keep_checkpoints,
            config.keep_best,
            runtime.device.type == "cuda" if in_background is None else in_background,
            config.input_timeout,
        )
        self.checkpoints.resume_from(point.tag if point else None)
        self.same_folder = SameFolder(folder, config.wait_for_folder)
        not_finite = folder / f"not_finite_rank{runtime.rank}.jsonl"
        self.guard = StepGuard(engine.module, runtime, config.max_skipped_steps, not_finite)
        # of this epoch: sum of the losses, their number, and how many of these steps have changed the weights
        self.epoch_loss = torch.zeros(3, device=runtime.device, dtype=torch.float64)
        self.first_step = 0
        self.unwritten: str | None = None
        self.patience: Patience | None = None
        if isinstance(config, ConfidenceConfig) and config.patience:
            self.patience = Patience(config.patience)
        if point:
            self._resume(point)
        self.last_step = config.epochs * self.per_epoch
        if config.max_steps:
            self.last_step = min(self.last_step, config.max_steps)
        self.clock = Breakdown(runtime.device)
        self.samples = self._open_samples() if config.record_samples else None

    def _resume(self, point: ResumePoint) -> None:
        state, engine = point.state, self.engine
        checkpoints.load(engine, point, self.stage.centers)
        self.first_step = state.step
        self.schedule.load_state_dict(state.schedule)
        total, count, *applied = state.epoch_loss  # older versions have not counted the last
        self.epoch_loss.copy_(torch.tensor([total, count, *(applied or [count])], dtype=torch.float64))
        if self.patience and state.patience:
            self.patience.restore(state.patience)
        same_layout = (state.world_size, state.zero_stage) == (self.runtime.world_size, engine.zero_stage)
        log.info(
            "resumed at step %d (epoch %d)%s",
            self.first_step,
            self.first_step // self.per_epoch + 1,
            "" if same_layout else f", written by {state.world_size} ranks with ZeRO {state.zero_stage}",
            extra={"event": "resume", "step": self.first_step},
        )

    def _open_samples(self) -> StepLines:
        if self.runtime.is_main:  # whichever number of ranks has written them
            for path in self.folder.glob("samples_rank*.jsonl"):
                forget_after(path, self.first_step)
        dist.barrier()
        return StepLines(self.folder / f"samples_rank{self.runtime.rank}.jsonl")

    def train(self) -> str | None:
        """Trains to the end; returns the name of the signal that came before it."""
        runtime = self.runtime
        log.info(
            "stage %s: %d images, %d identities, %d steps an epoch, %.1f M trained parameters, %d rank%s on %s, ZeRO "
            "%d",
            self.config.stage,
            len(self.source),
            self.source.num_classes,
            self.per_epoch,
            self.engine.num_parameters / 1e6,
            runtime.world_size,
            "s" * (runtime.world_size > 1),
            runtime.device.type,
            self.engine.zero_stage,
            extra={"event": "start", "step": self.first_step},
        )
        note = describe_groups(self.sampler)
        if note:
            log.info("%s", note)
        if self.first_step >= self.last_step or (self.patience and self.patience.is_over):
            self._export(self.first_step)  # a run that died after its last checkpoint may not have
            over = ", and its patience is over" if self.patience and self.patience.is_over else ""
            log.info("nothing to do: the run is at step %d of %d%s", self.first_step, self.last_step, over)
            self._check_written()
            return None
        loader = self.stage.make_loader(self.source, self.sampler, runtime)
        reporter = self._open_reporter()
        trace = self.folder / "profile" if self.config.profile else None
        profile = StepProfile(runtime, self.first_step, self.last_step, trace)
        batches = self._batches(loader)
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
            step, stopped = self._make_steps(batches, reporter, profile, signal)
            distributed.mark("the last checkpoint")
            self.checkpoints.finish()
        stopped_by = distributed.broadcast_from_main(signal.name or "a signal") if stopped else None
        self._summarize(step, loader, profile, stopped_by)
        if stopped_by is None:
            self._check_written()
        return stopped_by

    def _open_reporter(self) -> Reporter:
        return Reporter(
            self.folder,
            self.runtime,
            self._images_until(self.last_step),
            self._images_until(self.first_step),
            self.first_step,
            self.config.tensorboard,
        )

    def _images_until(self, step: int) -> int:
        """Returns how many images a run has shown after a step; with groups of a person, the mean over all orders."""
        return round(step * self.sampler.images_per_batch)

    def _batches(self, loader: BatchLoader[Any]) -> Generator[Any, None, None]:
        """Yields batch after batch, over all epochs from the first step on."""
        for epoch in itertools.count(self.first_step // self.per_epoch):
            yield from loader.batches(epoch, start_batch=max(0, self.first_step - epoch * self.per_epoch))

    def _make_steps(
        self, batches: Iterator[Any], reporter: Reporter, profile: StepProfile, signal: StopSignal
    ) -> tuple[int, bool]:
        """Makes the steps; returns the last one made and whether a signal has stopped the run before its end."""
        config, step = self.config, self.first_step
        for step in range(self.first_step + 1, self.last_step + 1):  # counted from 1: the step that is being made
            distributed.mark("waiting for data", is_step=True)
            profile.before(step)
            rate = self.schedule.before_step(step - 1)
            batch = next(batches)
            self.clock.mark("data")
            distributed.mark(f"step {step}", is_step=True)
            outcome = self._step(batch, bool(signal.name))
            votes = outcome.votes
            profile.after(step)
            reporter.advance(self._images_until(step) - self._images_until(step - 1))
            if self.samples:
                self.samples.add({"step": step, "images": batch.indices.tolist()})
            try:
                self.guard.count(outcome.dropped, step, lambda: self._names(step))  # noqa: B023 -- called at once
                if step % self.per_epoch == 0 or step == self.last_step:
                    self._check_trained(step)
            except FloatingPointError:  # on all ranks
                self.checkpoints.finish()
                raise
            self._log(step, outcome, rate, reporter)
            distributed.mark("checkpoints, validation and exported files")
            if self.checkpoints.pending and not votes.writing:
                self.checkpoints.finish()
            epoch_ends, run_ends = step % self.per_epoch == 0, step == self.last_step
            is_due = config.checkpoint_every and step % config.checkpoint_every == 0
            if epoch_ends or run_ends or votes.stop or is_due:
                self._save(step, epoch_ends, rate, reporter)
            if epoch_ends or run_ends:
                self._export(step)
            self.clock.mark("checkpoints and logs")
            if votes.stop and not run_ends:
                return step, True
            if self.patience and self.patience.is_over:
                log.info("no lower loss of the people held out for %d epochs: the run ends", self.patience.limit)
                break
        return step, False

    def _check_trained(self, step: int) -> None:
        """Checks at the end of an epoch, or of the run, that it has trained something; the same on every rank.

        Raises:
            FloatingPointError: no step of the epoch has changed the weights.
        """
        if self.epoch_loss[2] > 0:
            return
        reasons = ", ".join(f"{count} times {reason.value}" for reason, count in self.guard.dropped.items())
        raise FloatingPointError(
            f"no step of epoch {(step - 1) // self.per_epoch + 1} has changed the weights ({reasons}); nothing of it "
            "is kept: lower --lr, or --resume from the last checkpoint"
        )

    def _check_written(self) -> None:
        if self.checkpoints.failed:
            raise Incomplete(
                "the last checkpoint could not be written; free some space and --resume, from "
                f"{self.checkpoints.written or 'the beginning'}"
            )
        if self.unwritten:
            raise Incomplete(f"{self.unwritten}; free some space and --resume: only the files are missing")

    def _step(self, batch: Any, stop: bool) -> StepOutcome:
        """Makes one optimizer step, or none where the loss has no finite value on any rank.

        Args:
            stop: whether a signal has reached this rank.
        """
        micro_batches, guard, centers = self.config.gradient_accumulation_steps, self.guard, self.stage.centers
        total, votes, applied = torch.zeros((), device=self.runtime.device), None, False
        guard.before_step()
        for number, part in enumerate(self.stage.divide(batch, micro_batches), 1):
            result = self.stage.loss(self.engine, part)
            guard.add_loss(result.loss)
            values = [result.loss.detach(), *result.metrics.values()]
            total = total + torch.stack([value.float() for value in values])
            is_last = number == micro_batches
            if is_last:
                guard.start_vote(stop, self.checkpoints.writing)
            self.clock.mark("forward")
            if centers is not None and centers.fused:  # they change in the backward pass, so the vote comes before it
                votes = guard.votes()
                if votes.not_finite:
                    return self._outcome(result, total, votes, Dropped.LOSS)
            self.engine.backward(result.loss)
            self.clock.mark("backward")
            if is_last:
                votes = guard.votes()
            applied = self.engine.step(skip=votes is not None and votes.not_finite)
        assert votes is not None, "the last micro-batch has voted"
        if centers is not None:
            centers.step(applied)
        dropped = None if applied else Dropped.LOSS if votes.not_finite else self.engine.dropped_for
        if not votes.not_finite:
            self.epoch_loss += torch.stack(
                [total[0] / micro_batches, total.new_ones(()), total.new_full((), float(applied))]
            )
        self.clock.mark("optimizer")
        return self._outcome(result, total / micro_batches, votes, dropped)

    def _outcome(self, last: StepResult, values: torch.Tensor, votes: Votes, dropped: Dropped | None) -> StepOutcome:
        return StepOutcome(self.stage.loss_name, list(last.metrics), values, last.distributions, votes, dropped)

    def _names(self, step: int) -> list[str]:
        """Returns the names of this rank's images of a step."""
        return [self.source.name(int(i)) for i in self.sampler.indices(*divmod(step - 1, self.per_epoch))]

    def _log(self, step: int, outcome: StepOutcome, rate: float, reporter: Reporter) -> None:
        if outcome.votes.not_finite:
            return
        plateau = self.schedule.plateau
        due = step % self.config.log_every == 0 or step in (self.first_step + 1, self.last_step)
        if not due and plateau is None:
            return
        means = outcome.averaged()
        if plateau is not None:
            plateau.step(means[self.stage.loss_name])
        if due:
            reporter.metrics(step, means, rate, outcome.distributions)
            self.stage.check_metrics(step, means)
            self.clock.collect()

    def _save(self, step: int, epoch_ends: bool, rate: float, reporter: Reporter) -> None:
        self.same_folder.require(self.checkpoints.written)
        self.engine.average_batchnorm_statistics()
        total, count, _ = distributed.average_over_ranks(self.epoch_loss).tolist()
        metric = total / count if epoch_ends and count else None
        measures = self.stage.validate(self.engine, self.runtime) if epoch_ends else None
        if measures is not None:
            metric = measures[VALIDATION_LOSS]
            reporter.metrics(step, measures, rate, {})
            if self.patience:
                self.patience.add(metric)
        if epoch_ends:
            self.epoch_loss.zero_()
        reporter.sync()  # the lines of a checkpoint's steps are on the disk when it is
        if self.samples:
            self.samples.sync()
        state = RunState(
            step=step,
            schedule=self.schedule.state_dict(),
            num_classes=self.source.num_classes,
            num_images=len(self.source),
            metric=metric,
            epoch_loss=self.epoch_loss.tolist(),
            world_size=self.runtime.world_size,
            zero_stage=self.engine.zero_stage,
            objective=list(self.config.objective) if isinstance(self.config, ConfidenceConfig) else None,
            patience=self.patience.state() if self.patience else None,
            slope=self.config.slope if isinstance(self.config, ConfidenceConfig) else None,
        )
        self.checkpoints.save(self.engine, state, self.stage.centers)

    def _export(self, step: int) -> None:
        self.same_folder.require(self.checkpoints.written)
        progress = Progress((step - 1) // self.per_epoch, step - 1)
        try:
            files = self.stage.export(self.engine, self.folder, self.runtime.is_main, progress)
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

    def _summarize(self, step: int, loader: BatchLoader[Any], profile: StepProfile, stopped_by: str | None) -> None:
        """Logs what the run has done and where its time went."""
        self.clock.collect()
        seconds = sum(self.clock.seconds.values())
        self.clock.split("data", loader.seconds)
        broken = torch.tensor(float(loader.count_broken()), device=self.runtime.device)
        is_known = self.runtime.device.type == "cuda" and self.precision != "fp32"
        peak = peak_flops(torch.cuda.get_device_name()) if is_known else None
        log_summary(
            step=step,
            steps=step - self.first_step,
            stopped_by=stopped_by,
            dropped=self.guard.dropped,
            broken_images=round(distributed.average_over_ranks(broken).item() * self.runtime.world_size),
            seconds=seconds,
            images_per_step=self.sampler.images_per_batch,
            flop_per_image=flop_per_image(self.config, self.stage.network(), self.source.num_classes),
            peak_flops=peak * self.runtime.world_size if peak else None,
            clock=self.clock,
            communication=profile.communication,
        )
