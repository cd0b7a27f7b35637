"""The training loop that both stages share: input, engine, steps, logs, checkpoints, resume."""
import contextlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from scf_fast import __version__, launch, published, run_state
from scf_fast import config as configuration
from scf_fast.backbone_stage import BackboneStage
from scf_fast.confidence_stage import ConfidenceStage
from scf_fast.config import Config
from scf_fast.engine import average_batchnorm_statistics, initialise_engine, load_deepspeed_config, resolve_precision, take_step
from scf_fast.finetune_stage import FinetuneStage
from scf_fast.inputs import epoch_sampler, open_data
from scf_fast.optimizers import LearningRate, build_optimizer

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
# A run may be continued with other hardware settings, a longer schedule or another cadence of logs, but these make it another run.
_IDENTITY = ("stage", "data", "batch_size", "seed", "network", "z_dim", "loss", "margins", "saved_bkb", "saved_fc", "finetune_bkb", "confidence_net",
             "normalizer", "radius", "label_smoothing", "sample_rate")


def versions() -> dict:
    """What decides a result besides the configuration."""
    found = {"python": platform.python_version(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"}
    for package in ("torch", "triton", "deepspeed", "nvidia-dali-cuda130", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["scf_fast"] = __version__
    if shutil.which("git"):
        root = Path(__file__).resolve().parents[1]
        found["git"] = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip() or None
    return found


def _claim_output(config: Config) -> dict | None:
    """Check the output folder against this run, before anything is written; the state to resume from, if any.

    Raises:
        ValueError: the folder holds another run, or this one without --resume.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file; give a folder")
    old = folder / CONFIG_FILE
    if not old.exists():
        if folder.exists() and any(folder.iterdir()) and not config.overwrite:
            raise ValueError(f"--output_dir {folder}: holds files that are no run of this program; give another folder, or --overwrite to delete them")
        return None
    if config.overwrite:
        return None
    before, now = configuration.load_saved(old), config.as_dict()
    different = [key for key in _IDENTITY if before.get(key) != now[key]]
    if different:
        what = ", ".join(f"{key} {before.get(key)!r} -> {now[key]!r}" for key in different)
        raise ValueError(f"--output_dir {folder}: holds a different run ({what}); give another folder, or --overwrite to delete it")
    if not config.resume:
        raise ValueError(f"--output_dir {folder}: holds this run already; give --resume to continue it, or --overwrite to delete it")
    return run_state.peek_checkpoint(folder / "checkpoints")


def _check_world(config: Config, world_size: int, state: dict | None) -> None:
    parts = world_size * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(f"--batch_size {config.batch_size} must be divisible by ranks x --gradient_accumulation_steps = {world_size} x "
                         f"{config.gradient_accumulation_steps}; nearest: {max(1, round(config.batch_size / parts)) * parts}")
    if state and config.stage != "backbone" and run_state.is_other_layout(state, world_size, config.zero_stage):
        raise ValueError(f"--resume: the checkpoint was written by {state['world_size']} ranks with ZeRO {state['zero_stage']}, this launch has {world_size} "
                         f"with ZeRO {config.zero_stage}; launch it with the same")


def _check_identities(config: Config, source, state: dict | None) -> None:
    if state and state["num_classes"] != source.num_classes:
        raise ValueError(f"--resume: the checkpoint was trained on {state['num_classes']} identities, but --data {config.data} now has "
                         f"{source.num_classes}; give the data set of that run")


def _open(config: Config):
    """The images to train on, and the stage that will."""
    source = open_data(config)
    kind = BackboneStage if config.stage == "backbone" else FinetuneStage if config.finetune_bkb else ConfidenceStage
    return source, kind(config, source)


class InputError(ValueError):
    """What the user gave cannot be trained on; the message says what, where and what to do."""


@contextlib.contextmanager
def _input_errors():
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


class Reporter:
    """Log lines, progress bar, metrics.jsonl and TensorBoard of the main rank; silent on the others."""

    def __init__(self, folder: Path, runtime: launch.Runtime, total_images: int, done_images: int, first_step: int, tensorboard: bool):
        self.is_main = runtime.is_main
        if not self.is_main:
            return
        self._metrics = open(folder / "metrics.jsonl", "a+")
        self._forget_after(first_step)
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self._writer = SummaryWriter(str(folder / "runs"))
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(total=total_images, initial=done_images, unit="img", unit_scale=True, smoothing=0.1, dynamic_ncols=True, disable=not self._interactive)
        self._started, self._start_images, self._done, self._total = time.monotonic(), done_images, done_images, total_images
        self._last_line = 0.0

    def _forget_after(self, step: int) -> None:
        """Drop the records of steps that a run which died had made after its last checkpoint: they are made again."""
        self._metrics.seek(0)
        kept = [line for line in self._metrics if line.endswith("}\n") and json.loads(line)["step"] <= step]
        self._metrics.truncate(0)
        self._metrics.writelines(kept)

    def advance(self, images: int) -> None:
        if self.is_main:
            self._done += images
            self._bar.update(images)

    def metrics(self, step: int, values: dict[str, float], rate: float, distribution: torch.Tensor | None) -> None:
        """One log point: the step's means over ranks, its learning rate and, in stage 2, kappa of this rank's images."""
        if not self.is_main:
            return
        if distribution is not None:
            kappa = distribution.float()
            quantiles = torch.quantile(kappa, kappa.new_tensor([0.05, 0.5, 0.95])).tolist()
            values.update({f"kappa_p{name}": value for name, value in zip(("05", "50", "95"), quantiles)})
        speed = (self._done - self._start_images) / max(time.monotonic() - self._started, 1e-9)
        record = {"step": step, **values, "lr": rate, "images_per_second": speed}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if self._writer:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
            if distribution is not None:
                self._writer.add_histogram("log_kappa", distribution.float().log(), step)
        shown = {name: f"{value:.4g}" for name, value in values.items() if not name.startswith(("neg_", "log_iv", "kappa_p"))}
        shown["lr"] = f"{rate:.3g}"
        self._bar.set_postfix(shown, refresh=False)
        if not self._interactive and (time.monotonic() - self._last_line > 10 or self._done == self._total):
            self._last_line = time.monotonic()
            left = (self._total - self._done) / max(speed, 1e-9)
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            log.info("step %d  %3.0f %%  %.0f img/s  %s left  %s", step, 100 * self._done / self._total, speed, tqdm.format_interval(left), text)

    def close(self) -> None:
        if self.is_main:
            self._bar.close()
            self._metrics.close()
            if self._writer:
                self._writer.close()


def _set_up_logging(folder: Path | None, is_main: bool) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main and folder is not None:
        handlers.append(logging.FileHandler(folder / "log.txt"))
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)


def train(config: Config) -> None:
    """Run one stage to its end.

    Raises:
        InputError: bad input, before any training; nothing has been written or deleted then.
        FloatingPointError: the loss is no longer finite.
    """
    rank, world_size = launch.environment()
    launched = "RANK" in os.environ
    folder = Path(config.output_dir)
    _set_up_logging(None, rank == 0)
    state = source = stage = None
    if rank == 0:  # checked by one rank before the group forms: the others must not see files that this one has just written
        with _input_errors():
            if config.deepspeed_config:
                load_deepspeed_config(config.deepspeed_config)
            state = _claim_output(config)
            _check_world(config, world_size, state)
            source, stage = _open(config)
            _check_identities(config, source, state)
            epoch_sampler(config, source, rank, world_size)
    runtime = launch.start()
    with _input_errors():
        if runtime.is_main:
            if config.overwrite and folder.exists():
                shutil.rmtree(folder)
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            configuration.save(config, folder / CONFIG_FILE, versions())
        dist.barrier()
        if not runtime.is_main:
            source, stage = _open(config)
            state = run_state.peek_checkpoint(folder / "checkpoints") if config.resume else None
        _set_up_logging(folder, runtime.is_main)
        for note in published.flag_notes(config, launched):
            log.info(note)
        torch.manual_seed(config.seed)  # the same weights on every rank
        precision = resolve_precision(config, runtime.device)
        log.info("precision: %s (%s)", precision, "auto" if config.precision == "auto" else "as given")
        module = stage.build(runtime, precision)
        if state and run_state.is_other_layout(state, runtime.world_size, config.zero_stage):
            run_state.load_weights(module, folder / "checkpoints")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(stage.optimizer_rule, trained, config, runtime.device)
    engine = initialise_engine(module, optimizer, config, runtime, precision)
    torch.manual_seed(config.seed + 1000 * (runtime.rank + 1))  # other dropout on every rank
    _run(config, runtime, engine, stage, source, state, folder)
    launch.finish(engine)


class _StepLog(NamedTuple):
    """What to log of one optimiser step, still on the device: the mean of each metric, and kappa of the last micro-batch in stage 2."""
    names: list[str]
    values: torch.Tensor
    distribution: torch.Tensor | None

    def averaged(self) -> dict[str, float]:
        """Means over ranks; synchronises with the device."""
        return dict(zip(self.names, launch.average_over_ranks(self.values.clone()).tolist()))


def _train_step(engine, stage, centers, batch, micro_batches: int) -> _StepLog:
    total, names, distribution = 0.0, [], None
    for parts in zip(*(tensor.chunk(micro_batches) for tensor in batch)):
        loss, metrics = stage.loss(engine, type(batch)(*parts))
        distribution = metrics.pop("kappa_distribution", None)
        engine.backward(loss)
        applied = take_step(engine)
        names = list(metrics)
        total = total + torch.stack([value.float() for value in metrics.values()])
    if centers is not None:
        centers.step(applied)
    return _StepLog(names, total / micro_batches, distribution)


def _run(config: Config, runtime: launch.Runtime, engine, stage, source, state: dict | None, folder: Path) -> None:
    sampler = epoch_sampler(config, source, runtime.rank, runtime.world_size)
    per_epoch = sampler.batches_per_epoch
    schedule = LearningRate(config, engine.basic_optimizer, per_epoch)
    centers = stage.centers if isinstance(stage, BackboneStage) else None
    first_step = 0
    if state is not None:
        state = run_state.load_checkpoint(engine, folder / "checkpoints", centers)
        first_step = state["step"]
        schedule.load_state_dict(state["schedule"])
        log.info("resumed at step %d (epoch %d)", first_step, first_step // per_epoch + 1)
    last_step = config.epochs * per_epoch
    if config.max_steps:
        last_step = min(last_step, config.max_steps)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    log.info("stage %s: %d images, %d identities, %d steps an epoch, %.1f M trained parameters, %d rank%s on %s, ZeRO %d", config.stage, len(source),
             source.num_classes, per_epoch, parameters / 1e6, runtime.world_size, "s" * (runtime.world_size > 1), runtime.device.type, config.zero_stage)
    if first_step >= last_step:
        log.info("nothing to do: the run is at step %d of %d", first_step, last_step)
        return

    loader = stage.make_loader(source, sampler, runtime)
    batches = (batch for epoch in itertools.count(first_step // per_epoch)
               for batch in loader.batches(epoch, start_batch=max(0, first_step - epoch * per_epoch)))
    reporter = Reporter(folder, runtime, last_step * config.batch_size, first_step * config.batch_size, first_step, config.tensorboard)
    engine.train()
    began = time.monotonic()
    with loader, contextlib.closing(reporter), contextlib.closing(batches):
        for step in range(first_step + 1, last_step + 1):  # counted from 1: the step that is being made
            rate = schedule.before_step(step - 1)
            result = _train_step(engine, stage, centers, next(batches), config.gradient_accumulation_steps)
            reporter.advance(config.batch_size)
            if schedule.plateau is not None:
                schedule.plateau.step(result.averaged()[result.names[0]])
            if step % config.log_every == 0 or step in (first_step + 1, last_step):
                means = result.averaged()
                if not all(map(math.isfinite, means.values())):
                    raise FloatingPointError(f"step {step} ({', '.join(f'{name} {value:.4g}' for name, value in means.items())}); "
                                             "lower --lr, or --resume from the last checkpoint")
                reporter.metrics(step, means, rate, result.distribution)
            epoch_ends = step % per_epoch == 0 or step == last_step
            if epoch_ends or (config.checkpoint_every and step % config.checkpoint_every == 0):
                average_batchnorm_statistics(engine.module)
                run_state.save_checkpoint(engine, folder / "checkpoints", {"step": step, "schedule": schedule.state_dict(), "num_classes": source.num_classes},
                                          config.keep_checkpoints,
                                          centers)
            if epoch_ends:
                files = stage.export(engine, folder, runtime.is_main, {"epoch": (step - 1) // per_epoch, "global_step": step - 1})
    seconds = time.monotonic() - began
    if len(loader.broken):
        log.warning("%d broken images on this rank were replaced by others; they are named above", len(loader.broken))
    log.info("done: %d steps in %s, %.0f img/s; wrote %s", last_step - first_step, tqdm.format_interval(seconds),
             (last_step - first_step) * config.batch_size / seconds, ", ".join(map(str, files)))
