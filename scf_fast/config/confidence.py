"""The options of stage 2, and of every pass over images with a frozen backbone."""

import math
from dataclasses import dataclass
from typing import ClassVar

from scf_fast.config.base import Config
from scf_fast.config.options import PerStage, option
from scf_fast.errors import InputError
from scf_fast.networks.confidence import CONFIDENCE_NETS, DEFAULT_RADIUS
from scf_fast.objectives import Density, Objective

PAIR_BATCH = (64, 4)  # of PFE's published code: people in a batch, images of each
_LARGEST_KAPPA = 1e8


def _number(text: str | None) -> float:
    """Returns the number that a text holds; NaN where it holds none."""
    try:
        return float(text or "")
    except ValueError:
        return math.nan


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
    feature_cache_local: bool = option(
        False,
        "--feature_cache is on each node's own disk: a node keeps there what its own ranks compute, which fills it "
        "over the epochs, and needs room for the whole; without it the folder must be one that all nodes share",
        group="system",
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
            self.feature_cache or not self.feature_cache_local,
            "feature_cache_local",
            "given with --feature_cache, the folder on each node",
        )
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
            ("data_weights", ()),
            ("max_images_per_identity", 0),
            ("images_per_identity", 0),
        ):
            require(getattr(self, flag) == neutral, flag, "left out with --validation")

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
