import hashlib
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from scf_fast.distributed import on_every_rank
from scf_fast.errors import InputError
from scf_fast.model import SCF
from scf_fast.networks.frozen import CHECK_IMAGES, FrozenBackbone, frozen_precisions, full_float32
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import Sampler
from scf_fast.pipelines.sources.base import ImageSource


class Embedder:
    """A model set up for inference alone: images -> features and log kappa, float32, the latter None of a backbone
    alone.

    Args:
        model: left as it is.
        device: where to run.
        precision: of the backbone: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: half precision on a GPU, where
            :meth:`settle` finds it accurate, and float32 on a CPU. The confidence net runs in float32.
        flip: embed the mirror image too, as insightface's protocols do: the features are added, the two log kappa
            averaged.
    Attributes:
        radius, normalization, embedding_dim: the model's.
        gives_kappa: whether it has a confidence net.
        key: digest of everything here that decides the numbers.
    Raises:
        ValueError: weights that are not finite.
    """

    def __init__(self, model: SCF, device: torch.device | str = "cpu", precision: str = "auto", flip: bool = False):
        self.device, self.flip = torch.device(device), flip
        self.radius, self.normalization, self.embedding_dim = model.radius, model.normalization, model.embedding_dim
        weights = hashlib.sha256(f"{model.normalization} {precision} {self.device.type} {flip}".encode())
        for name, value in sorted(model.state_dict().items()):
            if not value.isfinite().all():
                raise InputError(
                    f"the model's weights must be finite, and those of {name} are not; its training diverged, take an "
                    "earlier checkpoint"
                )
            weights.update(name.encode())
            weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.key = weights.hexdigest()
        self._precisions = (
            ("fp32",)
            if precision == "auto" and self.device.type == "cpu"
            else frozen_precisions(precision, self.device)
        )
        self._model_backbone, self._backbone = model.backbone, None
        self.gives_kappa = model.confidence_net is not None
        self._confidence_net = model.confidence_net.to(self.device) if self.gives_kappa else None
        self._batch_size = 0

    @property
    def settled(self) -> bool:
        """Whether the precision is chosen."""
        return self._backbone is not None

    def settle(self, images: torch.Tensor, batch_size: int = 1) -> None:
        """Chooses the backbone's precision: the first that is accurate on these images, in a process group on those of
        every rank. All ranks have to call it then, and get one precision; otherwise the first call of the embedder
        does.

        Args:
            images: (B, 3, 112, 112) normalized RGB on the device; the first 32 count.
            batch_size: the most images that later calls will bring, which a GPU compiles for.
        Raises:
            ValueError: no precision is accurate on all ranks.
        """
        images = images[:CHECK_IMAGES]
        self._batch_size = max(self._batch_size, batch_size, len(images))
        for precision in self._precisions:
            backbone, failure = (
                FrozenBackbone(
                    self._model_backbone, self.device, (precision,), self.device.type == "cuda", lambda: images
                ),
                None,
            )
            try:
                backbone(self._padded(images))
            except ValueError as error:
                failure = error
            if on_every_rank(failure is None):
                self._backbone = backbone
                return
        raise InputError(
            str(failure)
            if failure is not None
            else f"the backbone is not accurate in {self._precisions[-1]} on another rank"
        ) from failure

    def _padded(self, images):
        """On a GPU one size is compiled, and a shorter last batch is filled up."""
        return F.pad(images, (0, 0) * 3 + (0, self._batch_size - len(images))) if self.device.type == "cuda" else images

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, 3, 112, 112) normalized RGB on the device -> features (B, d) unnormalized, log kappa (B,) or None.

        Raises:
            ValueError: as in settle, on the first call.
        """
        if not self.settled:
            self.settle(images, len(images))
        features, log_kappa = self._embed(images)
        if self.flip:
            mirrored_features, mirrored_log_kappa = self._embed(images.flip(3))
            features, log_kappa = (
                features + mirrored_features,
                (log_kappa + mirrored_log_kappa) / 2 if self.gives_kappa else None,
            )
        return features, log_kappa

    @full_float32()
    def _embed(self, images):
        count, self._batch_size = len(images), max(self._batch_size, len(images))
        features, convf = self._backbone(self._padded(images))
        # A copy: the next call may write over the compiled backbone's output.
        log_kappa = self._confidence_net(convf[:count].float()) if self.gives_kappa else None
        return features[:count].to(torch.float32, copy=True), log_kappa


def room_for(embedder: Embedder, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features (count, d) and log kappa (count,), or None where the embedder gives none, for :func:`put` to fill."""
    return torch.empty(count, embedder.embedding_dim), torch.empty(count) if embedder.gives_kappa else None


def put(
    into: tuple[torch.Tensor, torch.Tensor | None], rows, features: torch.Tensor, log_kappa: torch.Tensor | None
) -> None:
    """Write some rows, a slice or (B,) indices, of what :func:`room_for` made."""
    into[0][rows] = features
    if into[1] is not None:
        into[1][rows] = log_kappa


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
    *,
    loader: str = "auto",
    num_workers: int = 2,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yields (indices, images) of batches of a source's images, in order, as the embedder takes them.

    Args:
        batches: (B,) int64 each.
        loader, num_workers: see scf_fast.pipelines.loader.make_loader.
    Raises:
        ValueError: an image cannot be decoded; the message names it.
    """
    sampler, preprocessing = (
        ChosenBatches(len(source), batches),
        Preprocessing(embedder.normalization, horizontal_flip=False),
    )
    with make_loader(
        source, sampler, preprocessing, device=embedder.device, backend=loader, num_workers=num_workers
    ) as batches_of_images:
        for images, _, indices in batches_of_images.batches(epoch=0):
            yield indices.numpy(), images


def embed_batches(
    embedder: Embedder,
    source: ImageSource,
    batches: list[np.ndarray],
    **loading,
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
    """Yields (indices, features, log kappa or None), on the CPU; the rest as in load_batches."""
    for indices, images in load_batches(embedder, source, batches, **loading):
        features, log_kappa = embedder(images)
        yield indices, features.cpu(), None if log_kappa is None else log_kappa.cpu()


def check_usable(
    features: torch.Tensor, log_kappa: torch.Tensor | None, source: ImageSource, indices: np.ndarray
) -> None:
    """Refuses what no distribution can be made of.

    Raises:
        ValueError: a feature is not finite or all zero, or kappa is not finite and positive in float32; the message
            names the first image.
    """
    usable = features.isfinite().all(dim=1) & features.any(dim=1)
    if log_kappa is not None:
        kappa = log_kappa.exp()
        usable &= kappa.isfinite() & (kappa > 0)
    if not usable.all():
        bad = indices[~usable.numpy()]
        raise InputError(
            f"features must be finite and not zero, and kappa finite and positive; {len(bad)} of {len(indices)} "
            "images are not so, the "
            f"first {source.name(int(bad[0]))}; look at that image, and at whether the model's training diverged"
        )


def default_device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
