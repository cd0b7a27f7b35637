"""The similarities that evaluations measure: cosine, and each density's likelihood with its pooling and confidence.

| density  | concentration                            | pair     | template                  |
|----------|------------------------------------------|----------|---------------------------|
| vMF      | kappa (N,)                               | Eqn (13) | Eqn (14)                  |
| Gaussian | precision, 1 / variance, (N,) or (N, D)  | MLS      | precision-weighted fusion |

Sources: Li et al., CVPR 2021, for von Mises-Fisher; Shi and Jain, ICCV 2019, Eqn (3) and section 4.2, for Gaussians.
"""

import abc
import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from scf_fast.evaluation.results import DENSITY_MEASURES, DensityMeasures, Score, ScoreHistogram
from scf_fast.inference import Embeddings
from scf_fast.kernels import (
    mutual_likelihood,
    mutual_likelihood_from_cosine,
    mutual_likelihood_histogram,
    mutual_likelihood_top_k,
    neutral_radius,
    pool_gaussian_templates,
    pool_templates,
    vmf_similarity_from_cosine,
    vmf_similarity_histogram,
    vmf_similarity_top_k,
)
from scf_fast.objectives import Density

# 8 and 512 MiB for each float64 copy of 512-wide rows; IJB-C has 15.7 M pairs
PAIRS_AT_ONCE = {"cpu": 1 << 11, "cuda": 1 << 17}
_SCORES_AT_ONCE = 1 << 22  # 32 MiB of float64
_BINS = 512  # of a score histogram
_PASSES = 3  # at most, of a score histogram


class Faces(NamedTuple):
    """Images or templates as distributions around a direction."""

    mu: torch.Tensor  # (N, D) floating point, of any length
    concentration: torch.Tensor | None = None  # (N,) or (N, D), kappa or 1 / variance; None where there is none

    def select(self, rows: torch.Tensor) -> "Faces":
        """Returns some of them, by (M,) int64 rows."""
        rows = rows.to(self.mu.device)
        return Faces(self.mu[rows], None if self.concentration is None else self.concentration[rows])

    def to(self, device: torch.device | str) -> "Faces":
        """Returns the same faces on a device."""
        return Faces(self.mu.to(device), None if self.concentration is None else self.concentration.to(device))

    def as_float32(self) -> "Faces":
        """Returns the same faces with float32 concentrations."""
        return Faces(self.mu, None if self.concentration is None else self.concentration.float())

    def followed_by(self, other: "Faces") -> "Faces":
        """Returns these faces and then the others."""
        concentration = None
        if self.concentration is not None and other.concentration is not None:
            concentration = torch.cat([self.concentration, other.concentration])
        return Faces(torch.cat([self.mu, other.mu]), concentration)

    @property
    def confidence(self) -> np.ndarray | None:
        """(N,) float64, the concentration, or its mean over the dimensions; None where there is none."""
        if self.concentration is None:
            return None
        values = self.concentration.double()
        return (values if values.ndim == 1 else values.mean(dim=1)).cpu().numpy()


class Similarity(abc.ABC):
    """A score of two faces, larger for more similar ones."""

    score: ClassVar[Score]

    @abc.abstractmethod
    def score_pairs(
        self, faces: Faces, cosine: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        """Returns (P,) float64 scores of the rows first[k] and second[k], whose cosine is known."""

    @abc.abstractmethod
    def find_most_similar(self, gallery: Faces, probes: Faces, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (Q, count) float64 highest scores of each probe, falling, and their rows of the gallery."""


class Cosine(Similarity):
    """The cosine of the two directions."""

    score = Score.COSINE

    def score_pairs(
        self, faces: Faces, cosine: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        return cosine

    def find_most_similar(self, gallery: Faces, probes: Faces, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes some probes at a time."""
        gallery_mu, probe_mu = F.normalize(gallery.mu.double()), F.normalize(probes.mu.double())
        bands = [
            torch.topk(rows @ gallery_mu.T, count, dim=1)
            for rows in probe_mu.split(max(1, _SCORES_AT_ONCE // len(gallery_mu)))
        ]
        return torch.cat([band.values for band in bands]), torch.cat([band.indices for band in bands])


class Likelihood(Similarity):
    """The log likelihood (nats) that two faces are of one person, under one density."""

    measures: ClassVar[DensityMeasures]

    @abc.abstractmethod
    def concentration_of(self, embeddings: Embeddings) -> torch.Tensor:
        """Returns (N,) float64 or (N, D) float32 concentrations of images, on the CPU."""

    @abc.abstractmethod
    def pool(self, faces: Faces, template_index: torch.Tensor, num_templates: int) -> Faces:
        """Pools faces into templates, float32.

        Args:
            template_index: (N,) int64 in [0, num_templates), on the device of the faces.
        """

    @abc.abstractmethod
    def _score_range(self, gallery: Faces, probes: Faces) -> tuple[float, float]:
        """Returns bounds of all scores of two sets, the first below the second."""

    @abc.abstractmethod
    def _count_scores(
        self, probes: Faces, probe_ids: torch.Tensor, gallery: Faces, gallery_ids: torch.Tensor, edges: np.ndarray
    ) -> torch.Tensor:
        """Returns (2, bins) counts of all scores, impostors first."""

    def faces_of(self, embeddings: Embeddings) -> Faces:
        """Returns images as distributions, on the CPU."""
        return Faces(embeddings.mu, self.concentration_of(embeddings))

    def count_comparisons(
        self, gallery: Faces, gallery_subjects: np.ndarray, probes: Faces, probe_subjects: np.ndarray
    ) -> ScoreHistogram:
        """Counts all Q x G scores, which never exist at once: over the range that they can have, then over the range
        that they do have.

        Args:
            gallery, probes: with finite concentrations.
            gallery_subjects, probe_subjects: (G,) and (Q,) int64.
        """
        probe_ids, gallery_ids = (
            torch.from_numpy(subjects).to(probes.mu.device) for subjects in (probe_subjects, gallery_subjects)
        )
        edges = np.linspace(*self._score_range(gallery, probes), _BINS + 1)
        for number in range(_PASSES):
            counts = self._count_scores(probes, probe_ids, gallery, gallery_ids, edges)
            impostor, genuine = counts.cpu().numpy()
            used = np.flatnonzero(impostor + genuine)
            if number > 0 and used[-1] - used[0] >= _BINS // 2:
                break
            if number + 1 < _PASSES:
                edges = np.linspace(edges[used[0]], edges[used[-1] + 1], _BINS + 1)
        return ScoreHistogram(edges, impostor, genuine, self.score)


class VMFLikelihood(Likelihood):
    """Eqn (13) of von Mises-Fisher distributions, and pooling by Eqn (14).

    Args:
        radius: of the sphere.
    """

    measures = DENSITY_MEASURES[Density.VMF]
    score = measures.score

    def __init__(self, radius: float):
        self._radius = radius

    def concentration_of(self, embeddings: Embeddings) -> torch.Tensor:
        assert embeddings.kappa is not None
        return torch.from_numpy(embeddings.kappa)

    def pool(self, faces: Faces, template_index: torch.Tensor, num_templates: int) -> Faces:
        return Faces(*pool_templates(faces.mu, _known(faces).float(), template_index, num_templates))

    def score_pairs(
        self, faces: Faces, cosine: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        kappa, dim, scores = _known(faces), faces.mu.shape[1], torch.empty_like(cosine)
        for start in range(0, len(first), _SCORES_AT_ONCE):
            piece = slice(start, start + _SCORES_AT_ONCE)
            scores[piece] = vmf_similarity_from_cosine(
                cosine[piece], kappa[first[piece]], kappa[second[piece]], dim, self._radius
            )
        return scores

    def find_most_similar(self, gallery: Faces, probes: Faces, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        dim = gallery.mu.shape[1]
        neutral = neutral_radius(dim)  # keeps scores small, so that float32 holds them well
        scores, rows = vmf_similarity_top_k(probes.mu, _known(probes), gallery.mu, _known(gallery), count, neutral)
        return scores.double() + dim * math.log(neutral / self._radius), rows

    def _score_range(self, gallery: Faces, probes: Faces) -> tuple[float, float]:
        dim = gallery.mu.shape[1]
        largest_probe, largest_gallery = torch.stack([_known(probes).max(), _known(gallery).max()]).double().cpu()
        same, opposite = vmf_similarity_from_cosine(
            torch.tensor([1.0, -1.0], dtype=torch.float64), largest_probe, largest_gallery, dim, neutral_radius(dim)
        ).tolist()
        # 1e-3: of two uniform distributions all scores are 0.
        return min(opposite, 0.0), max(same, 0.0) + 1e-3

    def _count_scores(
        self, probes: Faces, probe_ids: torch.Tensor, gallery: Faces, gallery_ids: torch.Tensor, edges: np.ndarray
    ) -> torch.Tensor:
        return vmf_similarity_histogram(
            probes.mu,
            _known(probes),
            probe_ids,
            gallery.mu,
            _known(gallery),
            gallery_ids,
            float(edges[0]),
            float(edges[-1]),
            len(edges) - 1,
            neutral_radius(gallery.mu.shape[1]),
        )


class GaussianLikelihood(Likelihood):
    """The mutual likelihood score of Gaussians, and their fusion, for one variance or one in each dimension.

    score = -1/2 sum_l [ (mu1_l - mu2_l)^2 / v_l + log v_l ] - (D/2) log 2 pi,   v_l = s1_l^2 + s2_l^2
    1 / s^2 = sum_m 1 / s_m^2,   mu = s^2 sum_m mu_m / s_m^2,   scaled to length one
    """

    measures = DENSITY_MEASURES[Density.GAUSSIAN]
    score = measures.score

    def concentration_of(self, embeddings: Embeddings) -> torch.Tensor:
        log_variance = embeddings.log_variance
        assert log_variance is not None
        # Those of all dimensions are as large as the features: float32 has to do.
        return (log_variance.double() if log_variance.ndim == 1 else log_variance).neg().exp()

    def pool(self, faces: Faces, template_index: torch.Tensor, num_templates: int) -> Faces:
        return Faces(*pool_gaussian_templates(faces.mu, _known(faces).float(), template_index, num_templates))

    def score_pairs(
        self, faces: Faces, cosine: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        precision, dim, scores = _known(faces), faces.mu.shape[1], torch.empty_like(cosine)
        by_cosine = precision.ndim == 1
        at_once = _SCORES_AT_ONCE if by_cosine else PAIRS_AT_ONCE["cuda" if cosine.is_cuda else "cpu"]
        for start in range(0, len(first), at_once):
            piece = slice(start, start + at_once)
            rows = first[piece], second[piece]
            log_variance1, log_variance2 = (-precision[row].double().log() for row in rows)
            if by_cosine:
                scores[piece] = mutual_likelihood_from_cosine(cosine[piece], log_variance1, log_variance2, dim)
            else:
                mu1, mu2 = (faces.mu[row].double() for row in rows)
                scores[piece] = mutual_likelihood(mu1, log_variance1, mu2, log_variance2)
        return scores

    def find_most_similar(self, gallery: Faces, probes: Faces, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, rows = mutual_likelihood_top_k(
            probes.mu, -_known(probes).log(), gallery.mu, -_known(gallery).log(), count
        )
        return scores.double(), rows

    def _score_range(self, gallery: Faces, probes: Faces) -> tuple[float, float]:
        """Of directions that agree with the smallest variances, and of opposite ones with the worst of either."""
        least, most = (
            (1 / getattr(_known(probes), end)(dim=0).double() + 1 / getattr(_known(gallery), end)(dim=0).double())
            for end in ("amax", "amin")
        )
        dim = gallery.mu.shape[1]
        low, high = (-dim / 2 * (2 * math.pi * variance).log().mean().item() for variance in (most, least))
        return low - 2 / least.min().item(), high

    def _count_scores(
        self, probes: Faces, probe_ids: torch.Tensor, gallery: Faces, gallery_ids: torch.Tensor, edges: np.ndarray
    ) -> torch.Tensor:
        return mutual_likelihood_histogram(
            probes.mu,
            -_known(probes).log(),
            probe_ids,
            gallery.mu,
            -_known(gallery).log(),
            gallery_ids,
            float(edges[0]),
            float(edges[-1]),
            len(edges) - 1,
        )


COSINE = Cosine()


def likelihood_of(embeddings: Embeddings, radius: float) -> Likelihood | None:
    """Returns the likelihood under the density of the model that made these embeddings; None of a backbone alone.

    Args:
        radius: of the model's sphere, which Gaussians have no use for.
    """
    if embeddings.prediction is None:
        return None
    return VMFLikelihood(radius) if embeddings.density is Density.VMF else GaussianLikelihood()


def _known(faces: Faces) -> torch.Tensor:
    assert faces.concentration is not None
    return faces.concentration
