"""One typed definition of every training option: defaults, ``--help``, YAML recipes and checks all come from here.

A field of one of the configuration classes is a flag (``batch_size`` -> ``--batch_size`` or ``--batch-size``) and a
recipe key. The options of both stages are in :class:`Config`, those of one stage in its subclass. Order of precedence:
default < recipe (``--config``) < command line.

Over 450 lines because it is a table, one entry an option.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from scf_fast.command import split_paths
from scf_fast.errors import InputError
from scf_fast.networks.backbones import ALIASES, BACKBONES
from scf_fast.networks.confidence import CONFIDENCE_NETS, DEFAULT_RADIUS
from scf_fast.objectives import Density, Objective
from scf_fast.pipelines.formats.atomic_file import write_text
from scf_fast.pipelines.loading.augmentation import PRESETS

PAIR_BATCH = (64, 4)  # of PFE's published code: people in a batch, images of each
MARGIN_PRESETS = {"arcface": (1.0, 0.5, 0.0), "cosface": (1.0, 0.0, 0.4), "combined": (1.0, 0.3, 0.2)}


_LARGEST_KAPPA = 1e8


def _number(text: str | None) -> float:
    """Returns the number that a text holds; NaN where it holds none."""
    try:
        return float(text or "")
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class PerStage:
    """A default that depends on the stage."""

    backbone: Any
    confidence: Any


@dataclass(frozen=True)
class Option:
    """Description of an option for the command line and the run folder, besides its type and default.

    Attributes:
        identity: whether another value makes it another run, which --resume refuses.
        reads: whether its value names files that a run reads and does not make.
    """

    help: str
    choices: tuple | None = None
    group: str = "training"
    metavar: str | None = None
    identity: bool = False
    reads: bool = False


def option(default: Any, help: str, **settings) -> Any:
    """Returns the dataclass field of an option; ``settings`` are those of :class:`Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **settings)})


def option_of(field: dataclasses.Field) -> Option:
    """Returns what :func:`option` was told about a field."""
    return field.metadata["option"]


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
                "max_steps",
                "max_images_per_identity",
                "images_per_identity",
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


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """Options of stage 1: a backbone under a margin softmax."""

    stage: ClassVar[str] = "backbone"
    default_zero_stage: ClassVar[int] = 1

    network: str = option(
        "ir_100",
        "backbone architecture: ir_* of the published code, tface_*, or insightface's iresnet* (r50 for iresnet50 is "
        "accepted); stage 2 reads it off the checkpoint instead",
        choices=tuple(BACKBONES),
        group="model",
        identity=True,
    )
    z_dim: int = option(512, "embedding width d", group="model", identity=True)
    dropout: float | None = option(
        None,
        "dropout before the embedding layer, in [0, 1); default: 0.4, for iresnet* 0",
        group="model",
        identity=True,
    )
    loss: str = option(
        "arcface",
        "margin preset: " + ", ".join(f"{name} {m}" for name, m in MARGIN_PRESETS.items()),
        choices=tuple(MARGIN_PRESETS),
        group="model",
        identity=True,
    )
    margins: tuple[float, float, float] = option(
        None,
        "m1,m2,m3 of cos(m1 theta + m2) - m3 (radians for m2); overrides --loss",
        group="model",
        metavar="M1,M2,M3",
        identity=True,
    )
    margin_gradient: str = option(
        "exact",
        "gradient at the target: the derivative, or s (as arcface_torch has it)",
        choices=("exact", "straight_through"),
        group="model",
        identity=True,
    )
    scale: float = option(64.0, "multiplier s of the logits", group="model", identity=True)
    label_smoothing: float = option(
        0.0, "share of the target distribution spread over all identities, in [0, 1)", group="model", identity=True
    )
    sample_rate: float = option(
        1.0,
        "share of the other identities that each step's softmax is over, drawn for each step (Partial FC), in (0, 1]",
        group="model",
        identity=True,
    )
    momentum: float = option(0.9, "SGD momentum")
    centers_state: str = option(
        "fp32",
        "type of the class centers' momentum; bf16 halves it, with stochastic rounding",
        choices=("fp32", "bf16"),
        group="system",
    )
    skip_below: float = option(
        0.0,
        "on a GPU the backward pass over the class centers leaves out tiles whose gradient is below this share of the "
        "largest "
        "possible, in [0, 1); 0 is exact, 0.000244 (2^-12) is under bf16's rounding",
        group="system",
    )
    fused_center_update: bool | None = option(
        None,
        "update class centers inside the backward pass, without storing their gradient; default: unless "
        "there is accumulation or fp16",
        group="system",
    )

    def _resolve(self) -> None:
        super()._resolve()
        self._set("network", ALIASES.get(self.network, self.network))
        if self.margins is None and self.loss in MARGIN_PRESETS:
            self._set("margins", MARGIN_PRESETS[self.loss])
        if self.normalization is None and self.network in BACKBONES:
            self._set("normalization", BACKBONES[self.network].normalization)

    def _check(self) -> None:
        super()._check()
        require = self._require
        require(self.momentum >= 0, "momentum", "0 or more")
        require(self.scale > 0, "scale", "positive")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        require(self.z_dim >= 2, "z_dim", "at least 2")
        require(len(self.margins) == 3, "margins", "three numbers m1,m2,m3")
        require(all(map(math.isfinite, self.margins)), "margins", "finite")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        require(0 < self.sample_rate <= 1, "sample_rate", "in (0, 1]")
        require(0 <= self.skip_below < 1, "skip_below", "in [0, 1)")
        require(
            not self.fused_center_update or (self.gradient_accumulation_steps == 1 and self.precision != "fp16"),
            "fused_center_update",
            "off with --gradient_accumulation_steps or fp16: the gradient is not complete, or may not count, in the "
            "backward pass",
        )


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Config):
    """Options of a pass over images with a frozen backbone, with or without training on its features."""

    stage: ClassVar[str] = "confidence"
    default_zero_stage: ClassVar[int] = 2

    saved_bkb: str = option(
        None,
        "backbone checkpoint of stage 1: of this program, the published code, TFace or insightface",
        group="model",
        metavar="FILE",
        identity=True,
        reads=True,
    )
    saved_fc: str | None = option(
        None,
        "class-center checkpoint of stage 1, of the same; the ranks' shards as a folder or as 'checkpoint_gpu_*.pt'. "
        "--objective pfe and pfe_vmf need none",
        group="model",
        metavar="FILE",
        identity=True,
        reads=True,
    )
    compile: bool | None = option(
        None,
        "fuse the frozen backbone with torch.compile; default: on a GPU, and on a CPU when enough images go through it",
        group="system",
    )
    feature_cache: str | None = option(
        None,
        "folder to keep the frozen backbone's features in: later epochs and runs then neither decode nor compute them",
        group="system",
        metavar="DIR",
        reads=True,
    )
    cache_dtype: str = option(
        "bf16", "type of the cached feature map", choices=("fp32", "fp16", "bf16", "fp8", "int8"), group="system"
    )
    cache_budget: float = option(
        0.0,
        "most GB (10^9 bytes) that the cache may take; what does not fit is computed in every epoch; 0: no limit",
        group="system",
    )

    def _check(self) -> None:
        super()._check()
        require = self._require
        require(self.saved_bkb, "saved_bkb", "given for stage 2: the backbone that stage 1 wrote")
        require(self.cache_budget >= 0, "cache_budget", "0 or more")
        require(
            self.augmentation == "none" or not self.feature_cache,
            "augmentation",
            "none with --feature_cache: the cache holds one picture an image",
        )


@dataclass(frozen=True, kw_only=True)
class ConfidenceConfig(FeatureConfig):
    """Options of stage 2: a confidence net on the frozen backbone, or with it."""

    objective: tuple[str, ...] = option(
        ("scf",),
        "what the confidence net is trained for, by the names in the paper's table. Density against the own class "
        "center: scf is SCF (von Mises-Fisher), scf_gaussian SCF-G (Gaussian). Against the other images of the person "
        "in the batch: pfe is PFE-G (Gaussian), pfe_vmf PFE-v (von Mises-Fisher). Two that share their batches "
        "(scf,scf_gaussian or pfe,pfe_vmf) train together, each a net of its own in OUTPUT/OBJECTIVE, from one pass "
        "over the data",
        group="model",
        metavar="{scf,scf_gaussian,pfe,pfe_vmf}",
        identity=True,
    )
    variance: str = option(
        "scalar",
        "variance of a Gaussian (scf_gaussian, pfe): one for each image, or one for each dimension too",
        choices=("scalar", "diagonal"),
        group="model",
        identity=True,
    )
    pair_batch: tuple[int, int] | None = option(
        None,
        "batches of pfe and pfe_vmf: P groups of K images of a person, each image once an epoch; --batch_size follows. "
        "A group can have K + 1 images or fewer than K at the end of a person's; people with one image are left out. "
        "Default: 64,4, as PFE's code has it",
        group="training",
        metavar="P,K",
        identity=True,
    )
    update_rule: str = option(
        "adam",
        "update of the confidence net: adam as SCF has it, or sgd with momentum 0.9 as PFE has it",
        choices=("adam", "sgd"),
        identity=True,
    )
    z_dim: int | None = option(
        None,
        "embedding width d; read off the checkpoint, which a value given here must match",
        group="model",
        identity=True,
    )
    finetune_bkb: bool = option(
        False,
        "train the backbone too, from --saved_bkb on, jointly with the confidence net",
        group="model",
        identity=True,
    )
    partial_identities: bool = option(
        False,
        "the data hold only some of the identities that --saved_fc has centers for, under the same numbers",
        group="model",
    )
    confidence_net: str = option(
        "mlp",
        "network on the last feature map: the published MLP of SCF, TFace's convolutional one, or PFE's two layers",
        choices=tuple(CONFIDENCE_NETS),
        group="model",
        identity=True,
    )
    convf_dim: int | None = option(
        None, "length of the flattened last feature map, checked against the backbone", group="model"
    )
    radius: float = option(DEFAULT_RADIUS, "radius r of the sphere", group="model", identity=True)
    normalizer: str = option(
        "exact",
        "vMF normalizer of scf: exact, or the published code's float32 formula (for comparison with old runs)",
        choices=("exact", "published"),
        group="model",
        identity=True,
    )
    initial_kappa: str | None = option(
        None,
        "kappa, or precision 1/variance, that the untrained confidence net starts from: auto is the one that fits the "
        "mean cosine of the first batches best; none is as PyTorch initializes mlp and conv (about 1), and as PFE's "
        "code starts pfe (variance e^-7); or a number. Default: auto, and none with --normalizer published",
        group="model",
        metavar="auto|none|NUMBER",
    )
    slope: str | None = option(
        None,
        "gradient of log kappa under scf: exact is the derivative of the loss; bounded has the same optimum and "
        "neither explodes above it nor vanishes below. Default: bounded, and exact with --normalizer published",
        choices=("bounded", "exact"),
    )
    validation: float = option(
        0.0,
        "share of the people (not images) that training leaves out: after each epoch the log and TensorBoard get their "
        "loss, the rank correlation of kappa with the cosine to the own center, the area under error versus reject and "
        "the reliability of kappa, and --keep_best goes by their loss; 0 is off",
        identity=True,
    )
    patience: int = option(
        0, "end the run after so many epochs in a row without a lower loss of --validation; 0 is off"
    )
    max_first_step: float | None = option(
        None,
        "lower --lr, if need be, to where a first step of Adam moves log kappa by at most this (measured on the first "
        "batch, to first order); 0 is off. Default: 4, and 0 with --normalizer published",
    )
    published_checkpoints: bool = option(
        None,
        "after each epoch write OUTPUT/ckpts/ckpt_eN.pt as the published code does, optimizer state "
        "included (4.7 GB for its confidence net); default: with --dataset",
        group="published",
    )

    @property
    def start(self) -> float | None:
        """The kappa or precision that --initial_kappa gives as a number; else None."""
        return None if self.initial_kappa in ("auto", "none") else _number(self.initial_kappa)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is trained for, each with a confidence net of its own, in the order of :class:`Objective`."""
        return tuple(map(Objective, self.objective))

    @property
    def is_pairwise(self) -> bool:
        """True where images are held against each other; the objectives of a run agree on it."""
        return self.objectives[0].is_pairwise

    @property
    def trains_backbone(self) -> bool:
        """True where the backbone is trained with the confidence net."""
        return self.finetune_bkb

    @property
    def trains_batchnorm(self) -> bool:
        """True where the backbone is trained too, or the confidence net has BatchNorm."""
        return self.finetune_bkb or self.confidence_net != "mlp"

    def outputs(self, objective: Objective, z_dim: int) -> int:
        """Returns how many values the confidence net of an objective predicts for an image."""
        return z_dim if self.variance == "diagonal" and objective.density is Density.GAUSSIAN else 1

    def _resolve(self) -> None:
        known, given = [objective.value for objective in Objective], self.objective
        if not given or len({*given}) < len(given) or not {*given} <= {*known}:
            raise InputError(
                f"--objective must be one of {', '.join(known)}, or several of them with commas between, got "
                f"{','.join(given) or 'none'}"
            )
        self._set("objective", tuple(name for name in known if name in given))  # one order: it is the same run
        if self.is_pairwise:
            pair_batch = self.pair_batch or PAIR_BATCH
            self._set("pair_batch", pair_batch)
            if isinstance(self.batch_size, PerStage):
                self._set("batch_size", math.prod(pair_batch))
        super()._resolve()
        exact = self.normalizer == "exact"
        for name, value in (
            ("initial_kappa", "auto" if exact else "none"),
            ("slope", "bounded" if exact else "exact"),
            ("max_first_step", 4.0 if exact else 0.0),
        ):
            if getattr(self, name) is None:
                self._set(name, value)
        self._set("initial_kappa", str(self.initial_kappa))  # of an older configuration, a number
        if self.published_checkpoints is None:
            self._set("published_checkpoints", bool(self.dataset) and self.objective == (Objective.SCF.value,))

    def _check(self) -> None:
        super()._check()
        require = self._require
        require(
            self.saved_fc or self.is_pairwise, "saved_fc", "given for stage 2: the class centers that stage 1 wrote"
        )
        require(self.radius > 0, "radius", "positive")
        require(self.z_dim is None or self.z_dim >= 2, "z_dim", "at least 2")
        start = self.initial_kappa
        require(
            start in ("auto", "none") or 0 < _number(start) < _LARGEST_KAPPA,
            "initial_kappa",
            f"auto, none, or a number between 0 and {_LARGEST_KAPPA:g}",
        )
        require(
            self.slope == "exact" or self.normalizer == "exact",
            "slope",
            "exact with --normalizer published, which has a slope of its own",
        )
        self._check_validation()
        assert self.max_first_step is not None, "resolved"
        require(self.max_first_step >= 0, "max_first_step", "0 or more")
        require(
            not (self.finetune_bkb and self.feature_cache),
            "finetune_bkb",
            "without --feature_cache: the features change with the backbone",
        )
        self._check_objective()
        self._check_pairs()
        self._check_several()

    def _check_validation(self) -> None:
        require = self._require
        require(0 <= self.validation < 1, "validation", "a share of the people, at least 0 and below 1")
        require(self.patience >= 0, "patience", "0 or more")
        require(not self.patience or self.validation, "patience", "0 without --validation, whose loss it waits for")
        if not self.validation:
            return
        for flag, neutral in (
            ("finetune_bkb", False),
            ("data_weights", ()),
            ("max_images_per_identity", 0),
            ("images_per_identity", 0),
        ):
            require(getattr(self, flag) == neutral, flag, "left out with --validation")
        if self.is_pairwise:
            raise InputError(
                f"--validation {self.validation:g} cannot be given with --objective {','.join(self.objective)}: people "
                "are held out of batches of single images alone"
            )

    def _check_objective(self) -> None:
        require, named = self._require, ",".join(self.objective)
        require(
            self.variance == "scalar" or any(o.density is Density.GAUSSIAN for o in self.objectives),
            "variance",
            f"scalar with --objective {named}: a von Mises-Fisher density has one kappa",
        )
        require(
            self.normalizer == "exact" or Objective.SCF in self.objectives,
            "normalizer",
            f"exact with --objective {named}: the published formula is that of scf alone",
        )
        require(
            not self.published_checkpoints or (self.objective == (Objective.SCF.value,) and self.update_rule == "adam"),
            "published_checkpoints",
            "off but for --objective scf alone, with Adam: the published code has no other",
        )

    def _check_pairs(self) -> None:
        require, named = self._require, ",".join(self.objective)
        if not self.is_pairwise:
            require(
                self.pair_batch is None,
                "pair_batch",
                f"left out with --objective {named}: pfe and pfe_vmf alone hold images against each other",
            )
            return
        assert self.pair_batch is not None, "resolved"
        text = ",".join(map(str, self.pair_batch))
        if len(self.pair_batch) != 2 or self.pair_batch[0] < 2 or self.pair_batch[1] < 2:
            raise InputError(
                f"--pair_batch must be P,K, at least two people and two images of each, as in 64,4, got {text}"
            )
        require(
            self.batch_size == math.prod(self.pair_batch),
            "batch_size",
            f"left out, or the {math.prod(self.pair_batch)} of --pair_batch {text}",
        )
        for flag, neutral in (
            ("data_weights", ()),
            ("max_images_per_identity", 0),
            ("images_per_identity", 0),
            ("shuffle", "global"),
        ):
            if getattr(self, flag) != neutral:
                raise InputError(
                    f"--{flag} cannot be given with --objective {named}: its batches are groups of --pair_batch "
                    "images of a person, which show each image once an epoch"
                )

    def _check_several(self) -> None:
        """Checks that objectives trained together share their batches, and train as they would alone."""
        if len(self.objective) == 1:
            return
        named = ",".join(self.objective)
        if len({objective.is_pairwise for objective in self.objectives}) > 1:
            raise InputError(
                f"--objective {named}: scf and scf_gaussian train on other batches than pfe and pfe_vmf; give each "
                "pair a run of its own"
            )
        for flag, couples in (
            ("--finetune_bkb", self.finetune_bkb),
            (f"--max_grad_norm {self.max_grad_norm}", self.max_grad_norm > 0),
            ("--lr_scheduler ReduceLROnPlateau", self.lr_scheduler == "ReduceLROnPlateau"),
        ):
            if couples:
                raise InputError(
                    f"--objective {named}: {flag} would couple the confidence nets, each of which trains as it would "
                    "alone; leave it out, or give each objective a run of its own"
                )


STAGES: dict[str, type[Config]] = {"backbone": BackboneConfig, "confidence": ConfidenceConfig}


def save(config: Config, path: Path, versions: dict) -> None:
    """Writes the resolved configuration and versions as YAML, complete or not at all."""
    text = yaml.safe_dump(
        {"config": config.as_dict(), "command": " ".join(sys.argv), "versions": versions}, sort_keys=False
    )
    write_text(path, text)


def load_saved(path: Path) -> dict:
    """Returns the ``config`` part of a file that :func:`save` wrote.

    Raises:
        InputError: it is no such file.
    """
    try:
        return yaml.safe_load(path.read_text())["config"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is no saved configuration ({type(error).__name__}); to go on with the "
            "checkpoints beside it, delete this file and give the same arguments with --resume; --overwrite starts over"
        ) from None
