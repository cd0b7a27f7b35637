"""Features that trainings of a confidence net are compared on: of a backbone, or drawn with a known kappa."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scf_fast.kernels import inverse_mean_resultant_length, mean_resultant_length
from scf_fast.model import SCF
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.weights.reading import read_weights

MAP_SIZE = 7
HELD_OUT = 0.2  # of the people
WRONG_LABELS = 0.02  # of drawn images
_BATCH = 64


@dataclass(frozen=True)
class Features:
    """What a frozen backbone gives for a set of images.

    Attributes:
        convf: (N, C, 7, 7) last feature map.
        mu: (N, d) unit directions.
        labels: (N,) rows of ``centers``.
        centers: (people, d) unit class centers.
    """

    convf: torch.Tensor
    mu: torch.Tensor
    labels: torch.Tensor
    centers: torch.Tensor

    @property
    def dim(self) -> int:
        return self.centers.shape[1]

    @property
    def channels(self) -> int:
        return self.convf.shape[1]

    @property
    def cos(self) -> torch.Tensor:
        """(N,) cosine of each image with its own center."""
        return (self.mu * self.centers[self.labels]).sum(dim=1)

    @property
    def fitting_kappa(self) -> float:
        """The one kappa that fits all images best: A_d^-1 of their mean cosine."""
        return inverse_mean_resultant_length(self.cos.double().mean(), self.dim).item()

    def rows(self, which: torch.Tensor) -> "Features":
        """Returns some of the images, with all centers."""
        return dataclasses.replace(self, convf=self.convf[which], mu=self.mu[which], labels=self.labels[which])

    def split(self) -> tuple["Features", "Features"]:
        """Returns the images of four people in five, and those of the others."""
        people = torch.randperm(len(self.centers), generator=torch.Generator().manual_seed(1))
        held_out = torch.isin(self.labels, people[: max(2, round(HELD_OUT * len(people)))])
        return self.rows(~held_out), self.rows(held_out)


def draw(dim: int, channels: int, people: int, images: int, seed: int = 0) -> Features:
    """Draws images whose quality shows in the feature map and, with unexplained scatter, in the cosine.

    log kappa is uniform over a factor of 30 from 0.2 d on, plus a normal part of 0.3 that the map does not show;
    cosines are normal around A_d(kappa) with the variance of the vMF, A'_d(kappa). A share of ``WRONG_LABELS`` has the
    cosine of strangers.

    Args:
        images: of each person.
    """
    g = torch.Generator().manual_seed(seed)
    centers = F.normalize(torch.randn(people, dim, generator=g))
    labels = torch.arange(people).repeat_interleave(images)
    count = len(labels)
    quality = torch.rand(count, generator=g)
    log_kappa = math.log(0.2 * dim) + math.log(30) * quality + 0.3 * torch.randn(count, generator=g)
    kappa = log_kappa.double().exp()
    mean = mean_resultant_length(kappa, dim)
    deviation = (1 - mean.square() - (dim - 1) * mean / kappa).clamp(min=0).sqrt()
    cos = (mean + deviation * torch.randn(count, generator=g, dtype=torch.float64)).clamp(-0.999, 0.999).float()
    strangers = torch.randn(count, generator=g).clamp(-3, 3) / math.sqrt(dim)
    cos = torch.where(torch.rand(count, generator=g) < WRONG_LABELS, strangers.clamp(-0.9, 0.9), cos)
    away = torch.randn(count, dim, generator=g)
    away = F.normalize(away - (away * centers[labels]).sum(dim=1, keepdim=True) * centers[labels])
    mu = cos[:, None] * centers[labels] + (1 - cos.square()).sqrt()[:, None] * away
    shape, quality = (channels, MAP_SIZE, MAP_SIZE), quality[:, None, None, None]
    patterns = 0.3 * torch.randn(2, *shape, generator=g)
    convf = (0.6 + 0.8 * quality) * torch.randn(count, *shape, generator=g)
    convf += (2 * quality - 1) * patterns[0] + torch.sin(4 * quality) * patterns[1]
    return Features(convf, mu, labels, centers)


@torch.no_grad()
def compute(backbone: str, class_centers: str, data: str, most: int) -> Features:
    """Computes the features of the first images of a data set.

    Args:
        backbone, class_centers: files of stage 1.
        most: images, all of them from the first people.
    """
    model = SCF.from_checkpoint(backbone, backbone_alone=True)
    source = open_source([data], None, None)
    count = min(most, len(source)) // _BATCH * _BATCH
    if not count:
        raise InputError(f"--data {data}: must have at least {_BATCH} images, got {len(source)}")
    loader = make_loader(
        source,
        EpochSampler(len(source), _BATCH, shuffle=False),
        Preprocessing(model.normalization, horizontal_flip=False),
        num_workers=1,
    )
    found = []
    with loader:
        for batch in itertools.islice(loader.batches(0), count // _BATCH):
            features, convf = model.backbone(batch.images)
            found.append((convf, F.normalize(features), batch.labels))
    convf, mu, labels = (torch.cat(parts).contiguous() for parts in zip(*found))
    centers = F.normalize(read_weights(class_centers, "--saved_fc").require_class_centers())
    people, labels = labels.unique(return_inverse=True)
    return Features(convf, mu, labels, centers[people])
