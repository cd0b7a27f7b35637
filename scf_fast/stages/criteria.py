"""Objectives of stage 2, each as the loss of one confidence net with what is logged of it."""

import abc
import logging
import math
from typing import NamedTuple

import torch

from scf_fast.config import ConfidenceConfig
from scf_fast.kernels import (
    gaussian_center_loss,
    inverse_mean_resultant_length,
    mean_resultant_length,
    pair_likelihood_loss,
    scf_loss,
)
from scf_fast.objectives import Density, Objective
from scf_fast.stages.base import StepResult
from scf_fast.stages.slope import weight_slope

log = logging.getLogger(__name__)

_DIVERGED = 1000.0  # times the one that fits the cosine
_COLLAPSED = 0.01  # of the largest value so far, and of the one that fits the cosine
_USUAL = (1e-3, 1e8)  # kappa and precision of a model in use
_LEAST_SPREAD = 1e-3  # of log kappa
_SECTIONS, _ROUNDS = 256, 7  # of the interval of log kappa, which is 40 wide: to float64's rounding


class PairShare(NamedTuple):
    """Shares of a micro-batch in the means over a global batch, 0-dim on the device each: whole groups do not divide it
    evenly.
    """

    of_pairs: torch.Tensor  # factor of a sum over this micro-batch's pairs: micro-batches and ranks average to the mean
    of_images: torch.Tensor  # the same of a sum over its images
    pairs: torch.Tensor  # of the global batch


def fitting_value(objective: Objective, cosine: float, dim: int) -> float:
    """Returns the kappa or the variance that has the lowest loss where every image has this cosine: with its class
    center, or with the other images of the person, which have the same kappa or variance.

        SCF    A_d(kappa) = cos                                       SCF-G  variance = 2 (1 - cos) / d
        PFE-v  sqrt(2 + 2 cos) A_d(kappa sqrt(2 + 2 cos)) = 2 A_d(kappa)    PFE-G  variance = (1 - cos) / d
    """
    if objective.density is Density.GAUSSIAN:
        return (1 - cosine) / dim * (1 if objective.is_pairwise else 2)
    if cosine <= 0:
        return 0.0
    if objective is Objective.SCF:
        return inverse_mean_resultant_length(torch.tensor(cosine, dtype=torch.float64), dim).item()
    factor, low, high = math.sqrt(2 + 2 * cosine), -20.0, 20.0
    for _ in range(_ROUNDS):  # each asks for many kappas at once: a call takes as long for one
        log_kappa = torch.linspace(low, high, _SECTIONS + 1, dtype=torch.float64)
        of_sum, of_one = mean_resultant_length(torch.stack((factor * log_kappa.exp(), log_kappa.exp())), dim)
        below = int((factor * of_sum > 2 * of_one).cumprod(0).sum())  # of the first ones, how many are too small
        low, high = log_kappa[max(below - 1, 0)].item(), log_kappa[min(below, _SECTIONS)].item()
    return math.exp(low)


class CollapseWatch:
    """Warns once that kappa or a variance has collapsed, or diverged: too large a step has thrown it far from the one
    that fits the cosine.

    The gradient with respect to log kappa vanishes with kappa: for SCF it is kappa (A_d(kappa) - cos theta). A variance
    ends at the floor of the confidence net, 1e-6, which no gradient passes. The published normalizer has no such end:
    it counts every kappa below 255 (d = 512) as too small.
    """

    def __init__(self, objective: Objective, dim: int):
        self._objective, self._dim, self._highest, self._warned = objective, dim, 0.0, False
        self._name = "kappa" if objective.density is Density.VMF else "variance"

    def check(self, step: int, value: float, cosine: float) -> None:
        """Checks the means of a batch: kappa or the variance, and the cosine with what the images are held against."""
        self._highest = max(self._highest, value)
        if self._warned:
            return
        fitting = fitting_value(self._objective, cosine, self._dim)
        if self._objective.density is Density.VMF and value > _DIVERGED * fitting > 0:
            self._warned = True
            log.warning(
                "step %d: kappa has diverged to %.1e, though a mean cosine of %.2f asks for %.4g: start again with a "
                "lower --lr, or with --warmup_epochs",
                step,
                value,
                cosine,
                fitting,
                extra={"event": "kappa_diverged", "step": step},
            )
        elif value < _COLLAPSED * min(self._highest, fitting):
            self._warned = True
            log.warning(
                "step %d: %s has collapsed to %.1e, where its gradient vanishes, though a mean cosine of %.2f asks "
                "for %.4g; it will hardly come back: start again with a lower --lr, with --warmup_epochs, or with "
                "another --initial_kappa",
                step,
                self._name,
                value,
                cosine,
                fitting,
                extra={"event": f"{self._name}_collapsed", "step": step},
            )


def doubt_about(confidence: torch.Tensor) -> str | None:
    """Returns what speaks against a model whose images have these kappas or precisions, (B,); None for a usual one."""
    values = confidence.float()
    outside = ~((values > _USUAL[0]) & (values < _USUAL[1]))
    if outside.float().mean() > 0.5:
        return (
            f"{outside.sum().item()} of {len(values)} images have a kappa or precision outside {_USUAL[0]:g} to "
            f"{_USUAL[1]:g}: the confidence net has collapsed or diverged"
        )
    if len(values) > 1 and values.log().std() < _LEAST_SPREAD:
        return "all images have the same kappa or precision: the confidence net has died"
    return None


class Criterion(abc.ABC):
    """Loss and metrics of one confidence net.

    Args:
        dim: embedding width d.
    Attributes:
        newest: (B,) kappa or precision of the newest batch; None before.
    """

    newest: torch.Tensor | None = None

    cosine: str  # the metric that the watch looks at
    value: str

    def __init__(self, objective: Objective, dim: int):
        self.objective, self._watch = objective, CollapseWatch(objective, dim)

    @abc.abstractmethod
    def loss(
        self, features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, share: PairShare | None
    ) -> StepResult:
        """Returns the loss of a micro-batch.

        Args:
            features: (B, d), unnormalized.
            parameter: what the net predicts: log kappa (B,), or log variance (B,) or (B, d).
            labels: (B,) int64, of rows of the class centers; or the same number for images that make genuine pairs.
            share: of pairs, else None.
        """

    def check(self, step: int, means: dict[str, float]) -> None:
        """Warns of a kappa or a variance that has collapsed."""
        self._watch.check(step, means[self.value], means[self.cosine])


class SCFCriterion(Criterion):
    """SCF: KL divergence of a Dirac at the class center from a von Mises-Fisher density."""

    cosine, value = "cos_theta", "kappa"

    def __init__(self, dim: int, class_centers: torch.Tensor, radius: float, normalizer: str, bounded: bool):
        super().__init__(Objective.SCF, dim)
        self._class_centers, self._radius, self._normalizer = class_centers, radius, normalizer
        self._dim, self._bounded = dim, bounded

    def loss(
        self, features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, share: PairShare | None
    ) -> StepResult:
        loss, terms = scf_loss(
            features,
            weight_slope(parameter, self._dim) if self._bounded else parameter,
            self._class_centers,
            labels,
            radius=self._radius,
            normalizer=self._normalizer,
            return_terms=True,
        )
        metrics = {  # under the published code's tags
            "kappa": terms.kappa.mean(),
            "neg_kappa_times_cos_theta": terms.l1.mean(),
            "neg_dim_scalar_times_log_kappa": terms.l2.mean(),
            "log_iv_kappa": terms.l3.mean(),
            "cos_theta": terms.cos.mean(),
        }
        return StepResult(loss, metrics, {"kappa": terms.kappa})


class GaussianCenterCriterion(Criterion):
    """SCF-G: KL divergence of a Dirac at the class center from a Gaussian."""

    cosine, value = "cos_theta", "variance"

    def __init__(self, dim: int, class_centers: torch.Tensor):
        super().__init__(Objective.SCF_GAUSSIAN, dim)
        self._class_centers = class_centers

    def loss(
        self, features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, share: PairShare | None
    ) -> StepResult:
        loss, terms = gaussian_center_loss(features, parameter, self._class_centers, labels, return_terms=True)
        metrics = {
            "precision": terms.precision.mean(),
            "variance": parameter.detach().exp().mean(),
            "cos_theta": terms.cos.mean(),
        }
        return StepResult(loss, metrics, {"precision": terms.precision})


class PairCriterion(Criterion):
    """PFE-G and PFE-v: negative log likelihood that two images of a person have one latent direction, averaged over the
    genuine pairs of the global batch.
    """

    cosine = "pair_cos"

    def __init__(self, objective: Objective, dim: int, radius: float):
        super().__init__(objective, dim)
        self._radius = radius
        self.value = "kappa" if objective.density is Density.VMF else "variance"

    def loss(
        self, features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, share: PairShare | None
    ) -> StepResult:
        assert share is not None, "batches of pairs have one"
        density = self.objective.density
        total, terms = pair_likelihood_loss(
            features,
            parameter,
            labels,
            density=density.value,
            radius=self._radius,
            reduction="sum",
            return_terms=True,
        )
        name = "kappa" if density is Density.VMF else "precision"
        metrics = {name: terms.confidence.sum() * share.of_images}
        if density is Density.GAUSSIAN:
            variance = parameter.detach().exp().reshape(len(features), -1).mean(dim=1)
            metrics["variance"] = variance.sum() * share.of_images
        metrics |= {"pair_cos": terms.cos.sum() * share.of_images, "pairs": share.pairs}
        return StepResult(total * share.of_pairs, metrics, {name: terms.confidence})


def make_criterion(
    objective: Objective, config: ConfidenceConfig, dim: int, class_centers: torch.Tensor | None
) -> Criterion:
    """Returns the criterion of an objective.

    Args:
        dim: embedding width d.
        class_centers: (C, d) on the device; None for pairs.
    """
    if objective.is_pairwise:
        return PairCriterion(objective, dim, config.radius)
    assert class_centers is not None, "the configuration has asked for them"
    if objective is Objective.SCF_GAUSSIAN:
        return GaussianCenterCriterion(dim, class_centers)
    return SCFCriterion(dim, class_centers, config.radius, config.normalizer, config.slope == "bounded")
