"""Images -> features and confidences -> scores of pairs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kernels.vmf_similarity import vmf_similarity
from pipelines.loader import Preprocessing, make_loader
from pipelines.sampler import EpochSampler
from pipelines.sources import ImageSource

_PAIRS_AT_ONCE = 1 << 14  # 64 MiB for each float64 copy of 512-wide rows; IJB-C has 15.7 M pairs


@dataclass(frozen=True)
class Embeddings:
    """What a model says of N images, on the CPU."""

    features: torch.Tensor  # (N, D) float32, unnormalised
    log_kappa: torch.Tensor  # (N,) float32

    @cached_property
    def mu(self) -> torch.Tensor:
        """(N, D) float32 unit directions."""
        return F.normalize(self.features)

    @cached_property
    def kappa(self) -> np.ndarray:
        """(N,) float64."""
        return self.log_kappa.double().exp().numpy()

    @cached_property
    def feature_norm(self) -> np.ndarray:
        """(N,) float64."""
        return torch.linalg.vector_norm(self.features, dim=1).double().numpy()


def embed_images(model, source: ImageSource, description: str, *, device: torch.device | str = "cpu", batch_size: int = 256,
                 backend: str = "auto", num_workers: int = 2, flip: bool = False) -> Embeddings:
    """Runs a model over a source, in its order, under a progress bar.

    Args:
        model: scf_fast.model.SCF on `device`.
        source: N images.
        description: names the images, on the progress bar and in messages.
        batch_size, backend, num_workers: see pipelines.loader.make_loader.
        flip: embed the mirror image too, as insightface's protocols do: the features are added, the two log kappa averaged.
    Raises:
        ValueError: an image cannot be decoded, a feature is zero, or a feature or kappa is not finite in float32; the message names
            the image.
    """
    features, log_kappa = torch.empty(len(source), model.embedding_dim), torch.empty(len(source))
    sampler = EpochSampler(len(source), batch_size, shuffle=False, last_batch="partial")
    preprocessing = Preprocessing(model.normalization, horizontal_flip=False)
    with (make_loader(source, sampler, preprocessing, device=device, backend=backend, num_workers=num_workers) as loader,
          tqdm(total=len(source), desc=description, unit=" images", mininterval=1) as progress):
        for images, _, indices in loader.batches(epoch=0):
            batch_features, batch_log_kappa = model.embed(images)
            if flip:
                mirrored_features, mirrored_log_kappa = model.embed(images.flip(3))
                batch_features = batch_features + mirrored_features
                batch_log_kappa = (batch_log_kappa + mirrored_log_kappa) / 2
            features[indices], log_kappa[indices] = batch_features.cpu(), batch_log_kappa.cpu()
            progress.update(len(indices))
    embeddings = Embeddings(features, log_kappa)
    usable = features.isfinite().all(dim=1).numpy() & features.any(dim=1).numpy() & embeddings.log_kappa.exp().isfinite().numpy()
    if not usable.all():
        bad = np.flatnonzero(~usable)
        raise ValueError(f"features must be finite and not zero, and kappa finite; {len(bad)} of {len(source)} images are not so, "
                         f"the first {source.name(int(bad[0]))} of {description}; look at that image, and at whether the model's training diverged")
    return embeddings


def pair_cosine(mu: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """(P,) float64 cosine of rows first[k] and second[k] of mu, (N, D) floating point; 0 where a row is zero."""
    pieces = zip(first.split(_PAIRS_AT_ONCE), second.split(_PAIRS_AT_ONCE))
    return torch.cat([(F.normalize(mu[i].double()) * F.normalize(mu[j].double())).sum(dim=1) for i, j in pieces]).numpy()


def pair_vmf(mu: torch.Tensor, kappa: torch.Tensor, first: torch.Tensor, second: torch.Tensor, radius: float) -> np.ndarray:
    """(P,) float64 similarity by Eqn (13), in nats, of rows first[k] and second[k]; see kernels.vmf_similarity."""
    pieces = zip(first.split(_PAIRS_AT_ONCE), second.split(_PAIRS_AT_ONCE))
    return torch.cat([vmf_similarity(mu[i].double(), kappa[i].double(), mu[j].double(), kappa[j].double(), radius) for i, j in pieces]).numpy()
