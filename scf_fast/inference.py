"""Inference with a trained model: images -> features and log kappa or log variance, in batches of any image source."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from scf_fast.distributed import all_ranks_agree, decoding_workers, gpu_number
from scf_fast.errors import InputError
from scf_fast.model import SCF, confidence_of
from scf_fast.networks.frozen import CHECK_IMAGES, FrozenBackbone, frozen_precisions, full_float32
from scf_fast.objectives import Density, Objective
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.loading.broken import OnBroken
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.waiting import DEFAULT_TIMEOUT
from scf_fast.weights.digest import digest_weights


@dataclass(frozen=True)
class Decoding:
    """How images are read and decoded; see :func:`scf_fast.pipelines.loader.make_loader`."""

    backend: str = "auto"  # "dali", "torch", or "auto": DALI where it is installed
    num_workers: int | None = None  # threads of DALI, or processes; None: by the CPU cores of a rank
    timeout: float = DEFAULT_TIMEOUT  # seconds without progress


DEFAULT_DECODING = Decoding()


@dataclass(frozen=True)
class InferenceOptions:
    """Settings shared by all commands that embed images; their flags are in :mod:`scf_fast.inference_arguments`."""

    normalization: str | None = None  # None: as the model's files say, see SCF.from_checkpoint
    flip: bool = False
    device: torch.device | None = None  # None: see default_device
    precision: str = "auto"
    batch_size: int = 256  # images
    decoding: Decoding = DEFAULT_DECODING
    strict: bool = False  # an image that cannot be decoded is an error; otherwise it is left out, and said


@dataclass(frozen=True)
class Embeddings:
    """Outputs of a model for N images."""

    features: torch.Tensor  # (N, D) float32, unnormalized
    # float32, (N,) log kappa, or (N,) or (N, D) log variances, as `density` says; None from a backbone alone
    prediction: torch.Tensor | None = None
    density: Density = Density.VMF
    # images that could not be decoded, row -> reason; their rows are NaN
    left_out: dict[int, str] = field(default_factory=dict)

    @classmethod
    def allocate(cls, count: int, embedding_dim: int, outputs: int, density: Density = Density.VMF) -> "Embeddings":
        """Returns uninitialized embeddings on the CPU, for :meth:`write_rows` to fill.

        Args:
            outputs: values that the confidence net predicts for each image; 0 without one.
        """
        shape = (count,) if outputs == 1 else (count, outputs)
        return cls(torch.empty(count, embedding_dim), torch.empty(shape) if outputs else None, density)

    def __len__(self) -> int:
        return len(self.features)

    def write_rows(self, rows: slice | torch.Tensor, values: "Embeddings") -> None:
        """Overwrites some rows: a slice of them, or (B,) int64 indices."""
        self.features[rows] = values.features
        if self.prediction is not None and values.prediction is not None:
            self.prediction[rows] = values.prediction

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Marks rows, given as row -> reason, as those of images that could not be decoded."""
        self.left_out.update(reasons)
        rows = torch.tensor(list(reasons), dtype=torch.int64)
        self.features[rows] = torch.nan
        if self.prediction is not None:
            self.prediction[rows] = torch.nan

    def select(self, rows: np.ndarray) -> "Embeddings":
        """Returns the embeddings of some images, (M,) int64 rows, none of them left out."""
        index = torch.from_numpy(rows)
        prediction = None if self.prediction is None else self.prediction[index]
        return Embeddings(self.features[index], prediction, self.density)

    def cpu(self) -> "Embeddings":
        """Returns the same embeddings on the CPU."""
        return replace(
            self, features=self.features.cpu(), prediction=None if self.prediction is None else self.prediction.cpu()
        )

    def check_usable(self, source: ImageSource, first: int = 0) -> None:
        """Checks that a distribution can be made of every row that is not left out.

        Args:
            source: where the images are from.
            first: the source's image that row 0 belongs to; the others follow in order.
        Raises:
            InputError: a feature vector is not finite or all zero, or kappa or a variance is not finite and positive in
                float32, nor the variance's inverse; the message names the first such image.
        """
        usable = self.features.isfinite().all(dim=1) & self.features.any(dim=1)
        if self.prediction is not None:
            # Gaussians need the inverse of the variance too.
            signs = (1, -1) if self.density is Density.GAUSSIAN else (1,)
            for sign in signs:
                values = (sign * self.prediction).exp()
                good = values.isfinite() & (values > 0)
                usable &= good if good.ndim == 1 else good.all(dim=1)
        usable[torch.tensor(list(self.left_out), dtype=torch.int64)] = True
        if not usable.all():
            bad = (~usable).nonzero()[:, 0].tolist()
            parameter = "kappa" if self.density is Density.VMF else "variances"
            raise InputError(
                f"features must be finite and not zero, and {parameter} finite and positive; those of {len(bad)} of "
                f"{len(self)} images are not, the first {source.name(first + bad[0])}; look at that image, and check "
                "whether the model's training diverged"
            )

    @cached_property
    def mu(self) -> torch.Tensor:
        """(N, D) float32 unit directions."""
        return F.normalize(self.features)

    @property
    def log_kappa(self) -> torch.Tensor | None:
        """(N,) float32, or None: of a backbone alone, and of Gaussians."""
        return self.prediction if self.density is Density.VMF else None

    @property
    def log_variance(self) -> torch.Tensor | None:
        """(N,) or (N, D) float32, or None: of a backbone alone, and of von Mises-Fisher distributions."""
        return self.prediction if self.density is Density.GAUSSIAN else None

    @cached_property
    def confidence(self) -> np.ndarray | None:
        """(N,) float64, kappa or 1 / variance as in scf_fast.model.confidence_of, or None."""
        return None if self.prediction is None else confidence_of(self.prediction.double(), self.density).numpy()

    @property
    def kappa(self) -> np.ndarray | None:
        """(N,) float64, or None as for :attr:`log_kappa`."""
        return self.confidence if self.density is Density.VMF else None

    @cached_property
    def feature_norm(self) -> np.ndarray:
        """(N,) float64."""
        return torch.linalg.vector_norm(self.features, dim=1).double().numpy()


class Embedder:
    """A model set up for inference alone: images -> :class:`Embeddings` in float32.

    Args:
        model: left as it is.
        device: where to run.
        precision: of the backbone: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: half precision on a GPU, where
            :meth:`settle` finds it accurate, and float32 on a CPU. The confidence net runs in float32.
        flip: embed the mirror image too, as insightface's protocols do: the features are added, and the two log kappa
            or log variances averaged, so that kappa and 1 / variance are geometric means.
    Attributes:
        radius, normalization, embedding_dim: the model's.
        objective: the model's; None of a backbone alone, which gives no confidence.
        density: whose parameter it predicts.
        outputs: values that it predicts for each image; 0 without a confidence net.
        key: digest of everything here that decides the numbers.
    Raises:
        InputError: the weights are not finite.
    """

    def __init__(self, model: SCF, device: torch.device | str = "cpu", precision: str = "auto", flip: bool = False):
        self.device, self.flip = torch.device(device), flip
        self.radius, self.normalization, self.embedding_dim = model.radius, model.normalization, model.embedding_dim
        _check_finite(model)
        # The density decides what a prediction is; it is left out where it was before there were several, so that what
        # was stored then is still found.
        density = "" if model.density is Density.VMF else f" {model.density.value}"
        context = f"{model.normalization} {precision} {self.device.type} {flip}{density}"
        self.key = digest_weights(model.state_dict(), context)
        self._precisions = (
            ("fp32",)
            if precision == "auto" and self.device.type == "cpu"
            else frozen_precisions(precision, self.device)
        )
        self._model_backbone = model.backbone
        self._backbone: FrozenBackbone | None = None
        self._confidence_net = None if model.confidence_net is None else model.confidence_net.to(self.device)
        self.outputs = model.outputs
        self.objective: Objective | None = None if self._confidence_net is None else model.objective
        self.density = model.density
        self._batch_size = 0

    @property
    def is_settled(self) -> bool:
        """True once the precision is chosen."""
        return self._backbone is not None

    def settle(self, images: torch.Tensor, batch_size: int = 1) -> None:
        """Chooses the backbone's precision: the first that is accurate on these images.

        In a process group all ranks must call it, and agree on the first precision that is accurate on every rank's
        images. Without a group the embedder's first call does it.

        Args:
            images: (B, 3, 112, 112) normalized RGB on the device; the first 32 count.
            batch_size: the most images that later calls will bring, which a GPU compiles for.
        Raises:
            InputError: no precision is accurate on all ranks.
        """
        images = images[:CHECK_IMAGES]
        self._batch_size = max(self._batch_size, batch_size, len(images))
        for precision in self._precisions:
            compiled = self.device.type == "cuda"
            backbone = FrozenBackbone(self._model_backbone, self.device, (precision,), compiled, lambda: images)
            failure = None
            try:
                backbone(self._pad(images))
            except InputError as error:
                failure = error
            if all_ranks_agree(failure is None):
                self._backbone = backbone
                return
        raise InputError(
            str(failure)
            if failure is not None
            else f"the backbone is not accurate in {self._precisions[-1]} on another rank"
        ) from failure

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        """Fills a shorter last batch up on a GPU, where one size is compiled."""
        return F.pad(images, (0, 0) * 3 + (0, self._batch_size - len(images))) if self.device.type == "cuda" else images

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Embeddings:
        """Embeds (B, 3, 112, 112) normalized RGB on the device; the result lies there too.

        Raises:
            InputError: as in :meth:`settle`, on the first call.
        """
        return self.embed_with([self], images)[0]

    @torch.no_grad()
    def embed_with(self, embedders: "Sequence[Embedder]", images: torch.Tensor) -> list[Embeddings]:
        """Embeds (B, 3, 112, 112) normalized RGB by several models on this one's backbone, which runs once for all.

        Args:
            embedders: of models with the same backbone and pixel convention, on the same device, with equal settings.
        Raises:
            InputError: as in :meth:`settle`, on the first call.
        """
        if not self.is_settled:
            self.settle(images, len(images))
        found = self._embed(embedders, images)
        return list(map(_join_views, found, self._embed(embedders, images.flip(3)))) if self.flip else found

    @full_float32()
    def _embed(self, embedders: "Sequence[Embedder]", images: torch.Tensor) -> list[Embeddings]:
        assert self._backbone is not None
        count, self._batch_size = len(images), max(self._batch_size, len(images))
        features, convf = self._backbone(self._pad(images))
        # A copy: the next call may write over the compiled backbone's output.
        features, convf = features[:count].to(torch.float32, copy=True), convf[:count].float()
        return [Embeddings(features, embedder._predict(convf), embedder.density) for embedder in embedders]

    def _predict(self, convf: torch.Tensor) -> torch.Tensor | None:
        """(B, C, H, W) float32 -> what the confidence net predicts, if there is one."""
        return None if self._confidence_net is None else self._confidence_net(convf)


def _join_views(plain: Embeddings, mirrored: Embeddings) -> Embeddings:
    """Returns the embeddings of images from those of both orientations."""
    prediction = None
    if plain.prediction is not None and mirrored.prediction is not None:
        prediction = (plain.prediction + mirrored.prediction) / 2
    return Embeddings(plain.features + mirrored.features, prediction, plain.density)


def _check_finite(model: SCF) -> None:
    """Checks the weights of a model.

    Raises:
        InputError: a weight is not finite.
    """
    for name, value in sorted(model.state_dict().items()):
        if not value.isfinite().all():
            raise InputError(
                f"the model's weights must be finite, and those of {name} are not; its training diverged, take an "
                "earlier checkpoint"
            )


def open_embedder(path: str | Path, options: InferenceOptions) -> Embedder:
    """Reads the model in weight files of any family, a backbone alone included, and sets it up for inference.

    Raises:
        InputError: as in :meth:`scf_fast.model.SCF.from_checkpoint` and :class:`Embedder`.
    """
    model = SCF.from_checkpoint(path, normalization=options.normalization, backbone_alone=True)
    return Embedder(model, options.device or default_device(), options.precision, options.flip)


def default_device() -> torch.device:
    """Returns this rank's GPU, or the CPU on a machine without one."""
    return torch.device("cuda", gpu_number()) if torch.cuda.is_available() else torch.device("cpu")


class ChosenBatches(Sampler):
    """Samples batches that were chosen beforehand, none mirrored."""

    world_size = 1

    def __init__(self, num_samples: int, batches: list[np.ndarray]):
        self.num_samples, self.batches_per_epoch, self._batches = num_samples, len(batches), batches
        self.global_batch_size = max(map(len, batches), default=1)

    def indices(self, epoch: int, batch: int) -> np.ndarray:
        return self._batches[batch]


def load_batches(
    embedder: Embedder,
    source: ImageSource,
    batches: list[np.ndarray],
    decoding: Decoding = DEFAULT_DECODING,
    left_out: dict[int, str] | None = None,
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Yields (indices, images) of batches of a source's images, in order, as the embedder takes them.

    Args:
        batches: (B,) int64 each.
        left_out: None: an image that cannot be decoded is an error. Otherwise it is black and has the index LEFT_OUT,
            and its position and the reason come in here, before its batch is yielded.
    Raises:
        InputError: an image cannot be decoded; the message names it. With ``left_out``, a hundred in a row cannot even
            be read.
    """
    sampler = ChosenBatches(len(source), batches)
    preprocessing = Preprocessing(embedder.normalization, horizontal_flip=False)
    with make_loader(
        source,
        sampler,
        preprocessing,
        device=embedder.device,
        backend=decoding.backend,
        num_workers=decoding_workers(decoding.num_workers),
        on_broken=(OnBroken.RAISE if left_out is None else OnBroken.LEAVE_OUT).value,
        timeout=decoding.timeout,
    ) as loader:
        for images, _, indices in loader.batches(epoch=0):
            if left_out is not None:
                left_out.update(loader.broken.found)
            yield indices, images


def embed_batches(
    embedder: Embedder,
    source: ImageSource,
    batches: list[np.ndarray],
    decoding: Decoding = DEFAULT_DECODING,
    left_out: dict[int, str] | None = None,
) -> Generator[tuple[torch.Tensor, Embeddings], None, None]:
    """Yields (indices, embeddings) on the CPU, without images that are left out; arguments and errors as in
    :func:`load_batches`.
    """
    for indices, images in load_batches(embedder, source, batches, decoding, left_out):
        shown = (indices >= 0).nonzero()[:, 0]
        embeddings = embedder(images).cpu()
        yield indices[shown], embeddings if len(shown) == len(indices) else embeddings.select(shown.numpy())
