"""The options of both stages. Precedence: default < recipe (``--config``) < command line."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from scf_fast.command import split_paths
from scf_fast.config.options import PerStage, option, option_of
from scf_fast.errors import InputError
from scf_fast.pipelines.loading.augmentation import PRESETS
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT, TIMEOUT_HELP


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of both stages. ``None`` means "not set"; the checks name the flag, what arrived and what to do.

    Frozen: what is found out later, such as the pixel convention of a checkpoint, makes a new one
    (``dataclasses.replace``).
    """

    stage: ClassVar[str]
    default_zero_stage: ClassVar[int]

    data: str = option(
        None,
        "a .rec file or its folder, .tar or .tfrecord shards, a list of images or TFRecords, or a folder of folders",
        group="task",
        metavar="PATH",
        identity=True,
        reads=True,
    )
    dataset: str | None = option(
        None,
        "instead of --data, as the published code has it: trains on DATAROOT/list/NAME_list.txt",
        group="task",
        metavar="NAME",
    )
    dataroot: str | None = option(
        None,
        "folder that relative paths and names in a list start from; default: with --dataset the current folder, else "
        "the list's own",
        group="task",
        metavar="DIR",
        reads=True,
    )
    output_dir: str = option(None, "where the run's files go", group="task", metavar="DIR")
    resume: bool = option(
        False, "continue from the newest checkpoint in --output_dir, or start if there is none", group="task"
    )
    overwrite: bool = option(False, "delete what an earlier run left in --output_dir", group="task")
    check: bool = option(
        False,
        "only check what training would need, on all ranks: files, folders, memory, versions, clocks, free space; "
        "leaves nothing behind",
        group="task",
    )
    seed: int = option(777, "seed of weights, shuffle and flips", group="task", identity=True)
    batch_size: int = option(
        PerStage(512, 1024), "images per optimizer step over all ranks; of pfe: P x K", identity=True
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches per optimizer step; divides a rank's share of --batch_size"
    )
    epochs: int = option(PerStage(20, 30), "passes over the data")
    lr: float = option(PerStage(0.1, 3e-5), "learning rate after warm-up")
    weight_decay: float = option(5e-4, "L2 term added to the gradient (not decoupled)")
    lr_scheduler: str = option(
        PerStage("Polynomial", "StepLR"),
        "learning-rate rule",
        choices=("Polynomial", "Cosine", "MultiStep", "StepLR", "Constant", "ReduceLROnPlateau"),
    )
    warmup_epochs: float = option(0.0, "linear warm-up, in epochs")
    power: float = option(1.0, "exponent of Polynomial: insightface's recipes use 1")
    milestones: tuple[int, ...] = option((), "epochs at which MultiStep multiplies by --gamma", metavar="E1,E2,...")
    step_size: int = option(2, "epochs between decays of StepLR")
    gamma: float = option(PerStage(0.1, 0.5), "factor of StepLR and MultiStep")
    plateau_patience: int = option(
        20000, "steps without improvement before ReduceLROnPlateau multiplies by 0.1 (it costs a host sync a step)"
    )
    max_grad_norm: float = option(
        PerStage(5.0, 0.0), "clip the global gradient norm, in stage 1 the backbone's (as arcface_torch); 0 is off"
    )
    max_grad_clip: float = option(0.0, "clip each gradient value; 0 is off")
    optimizer: str = option(
        "auto",
        "fused implementation of SGD/Adam: auto takes apex where it is there on a GPU, else torch; deepspeed "
        "has Adam alone and compiles for a minute at its first use",
        choices=("auto", "apex", "deepspeed", "torch"),
    )
    normalization: str | None = option(
        None,
        "pixels: insightface is (x - 127.5)/127.5, published is (x - 127.5)/128. Default: stage 1 takes what the "
        "--network's family was trained with (ir_*: published; others: insightface) and notes it in fc.pth; stage 2 "
        "takes the note in --saved_fc, else what the family of --saved_bkb was trained with",
        choices=("insightface", "published"),
        group="input",
        identity=True,
    )
    loader: str = option(
        "auto", "decoder: dali where installed, else torch", choices=("auto", "dali", "torch"), group="input"
    )
    num_workers: int | None = option(
        None,
        "decoding threads (DALI, at least one) or processes (torch; 0: none but the rank's own) a rank; default: one "
        "less than it has CPU cores, 1 to 16",
        group="input",
    )
    flip: bool = option(True, "random horizontal flip", group="input", identity=True)
    augmentation: str = option(
        "none",
        "random changes to the images: as arcface_torch has them, or with crops and occlusions too",
        choices=tuple(PRESETS),
        group="input",
        identity=True,
    )
    shuffle: str = option(
        "global",
        "block reads runs of neighboring images, for spinning disks and network mounts",
        choices=("global", "block"),
        group="input",
        identity=True,
    )
    data_weights: tuple[float, ...] = option(
        (),
        "share of each of several data sets in an epoch; default: each image once",
        group="input",
        metavar="W1,W2,...",
        identity=True,
    )
    max_images_per_identity: int = option(
        0, "at most so many images of an identity in an epoch; 0 is all", group="input", identity=True
    )
    images_per_identity: int = option(
        0,
        "exactly so many images of every identity in an epoch (class-balanced); 0 is off",
        group="input",
        identity=True,
    )
    index_dir: str | None = option(
        None, "folder for the indices of the data; default: beside the data", group="input", metavar="DIR", reads=True
    )
    input_timeout: float = option(DEFAULT_TIMEOUT, TIMEOUT_HELP, group="input", metavar="SECONDS")
    on_broken: str = option(
        "replace",
        "an image that cannot be decoded: replaced by the next good one and counted, or the end of the run",
        choices=("replace", "raise"),
        group="input",
    )
    precision: str = option(
        "auto",
        "forward and backward type; auto: bf16 where the GPU has it, fp32 on CPU. Parameters, BatchNorm statistics "
        "and the "
        "loss stay float32",
        choices=("auto", "fp32", "bf16", "fp16"),
        group="system",
    )
    zero_stage: int | None = option(
        None,
        "DeepSpeed ZeRO stage; default: 1 in stage 1, 2 in stage 2, and 0 on a single rank, which has nothing to "
        "divide",
        choices=(0, 1, 2, 3),
        group="system",
    )
    offload_optimizer: str = option(
        "none",
        "where optimizer states and float32 master weights are, and where the optimizer runs: none is the GPU, cpu "
        "is host memory, for a network that the GPU cannot hold; needs ZeRO 1 to 3",
        choices=("none", "cpu"),
        group="system",
    )
    timeout: float = option(
        60.0,
        "seconds without a sign of life of a rank after which the run ends and names it; the ranks may take 10 times "
        "as long to come, and to make a step; 0: no limit",
        group="system",
    )
    deepspeed_config: str | None = option(
        None, "DeepSpeed JSON whose keys override the generated ones", group="system", metavar="FILE", reads=True
    )
    log_every: int = option(20, "steps between log points; each costs one host synchronization", group="system")
    checkpoint_every: int = option(
        0, "steps between checkpoints besides the one after each epoch; 0 is off", group="system"
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept", group="system")
    keep_best: bool = option(
        False,
        "keep the checkpoint of the epoch with the lowest mean training loss too, or the lowest loss of --validation",
        group="system",
    )
    wait_for_folder: float = option(
        0.0,
        "seconds to wait for --output_dir at a checkpoint where it has gone or is another one, as when its disk is "
        "unmounted; then, and with 0 at once, the run ends with status 1",
        group="system",
        metavar="SECONDS",
    )
    background_checkpoints: bool | None = option(
        None, "write checkpoints while training goes on, from a copy in host memory; default: on a GPU", group="system"
    )
    max_skipped_steps: int = option(
        10,
        "end the run after so many steps in a row whose loss or gradient is not finite; each is skipped, its images "
        "are named",
        group="system",
    )
    record_samples: bool = option(
        False,
        "write the images of each step to OUTPUT/samples_rank*.jsonl: positions in the data, of what was shown",
        group="system",
    )
    profile: bool = option(False, "write a PyTorch profiler trace of five steps to OUTPUT/profile", group="system")
    max_steps: int = option(0, "stop after this many optimizer steps, checkpointed; 0 is off", group="system")
    tensorboard: bool = option(True, "write TensorBoard event files to OUTPUT/runs", group="system")
    gpu_ids: str | None = option(
        None,
        "GPUs for plain python, which uses the first; under a launcher the launcher chooses",
        group="published",
        metavar="I,J",
    )
    cuda: bool = option(True, "use the GPU where there is one; --no_cuda trains on the CPU", group="published")
    eval_batch_size: int | None = option(
        None, "accepted, without effect as in the published code: evaluation is a program of its own", group="published"
    )

    def __post_init__(self) -> None:
        self._resolve()
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), option_of(field).choices
            if choices and value is not None and value not in choices:
                raise InputError(f"--{field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _resolve(self) -> None:
        """Fills in what was not given."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, PerStage):
                self._set(field.name, getattr(value, self.stage))
        if self.dataset and not self.data:
            self._set("dataroot", self.dataroot or ".")
            self._set("data", str(Path(self.dataroot or ".") / "list" / f"{self.dataset}_list.txt"))

    def _require(self, condition: object, flag: str, what: str) -> None:
        if not condition:
            raise InputError(f"--{flag} must be {what}, got {getattr(self, flag)!r}")

    def _require_each(self, flags: Iterable[str], holds, what: str) -> None:
        for flag in flags:
            self._require(holds(getattr(self, flag)), flag, what)

    def _check(self) -> None:
        """Checks values and their combinations.

        Raises:
            InputError: one cannot be used; the message names the flag.
        """
        require = self._require
        require(self.data, "data", "given (or --dataset, as the published code has it)")
        require(self.output_dir, "output_dir", "given")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(not isinstance(value, float) or math.isfinite(value), field.name, "finite")
        self._require_each(
            (
                "batch_size",
                "gradient_accumulation_steps",
                "epochs",
                "step_size",
                "log_every",
                "keep_checkpoints",
                "max_skipped_steps",
            ),
            lambda value: value >= 1,
            "at least 1",
        )
        self._require_each(
            (
                "weight_decay",
                "warmup_epochs",
                "max_grad_norm",
                "max_grad_clip",
                "checkpoint_every",
                "input_timeout",
                "wait_for_folder",
                "max_steps",
                "max_images_per_identity",
                "images_per_identity",
                "timeout",
            ),
            lambda value: value >= 0,
            "0 or more",
        )
        self._require(self.num_workers is None or self.num_workers >= 0, "num_workers", "0 or more")
        self._require_each(("lr", "gamma", "power"), lambda value: value > 0, "positive")
        self._check_combinations()

    def _check_combinations(self) -> None:
        require = self._require
        require(abs(self.seed) < 1 << 63, "seed", "between -2^63 and 2^63")
        require(
            self.lr_scheduler != "MultiStep" or self.milestones,
            "milestones",
            "given for --lr_scheduler MultiStep, as in 10,18,24",
        )
        require(
            self.lr_scheduler != "ReduceLROnPlateau" or not self.warmup_epochs,
            "warmup_epochs",
            "0 with --lr_scheduler ReduceLROnPlateau",
        )
        require(
            self.gpu_ids is None or all(part.strip().isdigit() for part in str(self.gpu_ids).split(",")),
            "gpu_ids",
            "numbers with commas between",
        )
        require(self.warmup_epochs <= self.epochs, "warmup_epochs", f"at most --epochs ({self.epochs})")
        require(
            not (self.resume and self.overwrite),
            "resume",
            "without --overwrite: one continues the old run, the other deletes it",
        )
        chosen = [
            flag for flag in ("data_weights", "max_images_per_identity", "images_per_identity") if getattr(self, flag)
        ]
        require(
            len(chosen) < 2,
            chosen[0] if chosen else "",
            f"without --{chosen[-1] if chosen else ''}: only one of them can say what an epoch holds",
        )
        require(all(weight > 0 for weight in self.data_weights), "data_weights", "positive numbers")
        require(
            self.offload_optimizer == "none" or self.zero_stage != 0,
            "offload_optimizer",
            "none with --zero_stage 0: it is ZeRO that offloads",
        )

    @property
    def trains_backbone(self) -> bool:
        """True where the backbone is trained, alone or with a confidence net."""
        return self.stage == "backbone"

    @property
    def trains_batchnorm(self) -> bool:
        """True where a network in training has BatchNorm, which needs two images."""
        return self.stage == "backbone"

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The data sets that ``--data`` names."""
        return split_paths(self.data)

    def zero_stage_on(self, world_size: int) -> int:
        """Returns the ZeRO stage of a run on ``world_size`` ranks: the one given, or the default."""
        if self.zero_stage is not None:
            return self.zero_stage
        if world_size == 1 and self.offload_optimizer == "none":
            return 0
        return self.default_zero_stage

    def identity(self) -> dict[str, Any]:
        """Returns the options that make it this run and no other, as :meth:`as_dict` has them."""
        names = [field.name for field in dataclasses.fields(self) if option_of(field).identity]
        values = self.as_dict()
        return {name: values[name] for name in ("stage", *names)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns the default of each option, as :meth:`as_dict` would have it."""
        found = {}
        for field in dataclasses.fields(cls):
            default = field.default
            found[field.name] = getattr(default, cls.stage) if isinstance(default, PerStage) else default
        return json.loads(json.dumps(found))

    def input_paths(self) -> list[tuple[str, str]]:
        """Returns (option, path) of everything that the run reads and does not make."""
        return [
            (field.name, path)
            for field in dataclasses.fields(self)
            if option_of(field).reads and getattr(self, field.name)
            for path in split_paths(getattr(self, field.name))
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON and YAML can hold."""
        return {"stage": self.stage, **json.loads(json.dumps(dataclasses.asdict(self)))}
