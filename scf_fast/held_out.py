"""What kappa is worth for people that training has not seen: measured on their images alone, without class centers.

Under the model, two images of a person have the expected cosine A_d(f kappa_i) A_d(f kappa_j), whatever the direction
of their center, where f is a factor that all kappas of unseen people may lack. It is fitted over all pairs of a person,

    sum over i != j of kappa_i kappa_j (A_d(f kappa_i) A_d(f kappa_j) - <mu_i, mu_j>) = 0

and the cosine of an image with the center of its person is estimated from the person's other images,

    cos_i = <mu_i, sum_j kappa_j mu_j> / sum_j kappa_j A_d(f kappa_j),  j != i

(The cosine with the mean of a few images would be too low: that mean is not the center.)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scf_fast.errors import InputError
from scf_fast.kernels import mean_resultant_length
from scf_fast.ranking import error_versus_reject, spearman

DECILES = 10
_LOG_FACTOR = float(np.log(1e6))
_BISECTIONS, _ROWS = 60, 4096


@dataclass(frozen=True)
class Held:
    """Images of people held out.

    Attributes:
        mu: (N, d) unit directions, float32.
        kappa: (N,) float64, positive.
        labels: (N,) int64.
    """

    mu: np.ndarray
    kappa: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Reliability:
    """Mean cosine with the own center by decile of kappa, against A_d(kappa).

    Attributes:
        kappa: (10,) median of each decile.
        predicted: (10,) mean A_d(kappa).
        observed: (10,) mean cosine.
        error: mean over the deciles of |observed - predicted|.
        factor: on kappa, which fits these people.
    """

    kappa: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    error: float
    factor: float

    def as_json(self) -> dict[str, Any]:
        """Returns what results.json keeps."""
        columns = {name: getattr(self, name).tolist() for name in ("kappa", "predicted", "observed")}
        return {"error": self.error, "factor": self.factor, **columns}

    def lines(self) -> list[str]:
        """Returns a table: a header, and a line for each decile."""
        lines = [
            f"{kappa:10.4g}  {predicted:9.3f}  {observed:8.3f}"
            for kappa, predicted, observed in zip(self.kappa, self.predicted, self.observed)
        ]
        return ["     kappa  predicted  observed", *lines]


@dataclass(frozen=True)
class Measures:
    """What held-out people say of a confidence net.

    Attributes:
        spearman: of kappa with the cosine to the own center; NaN where kappa is constant.
        reject_area: area under error versus reject. Each image is compared with the center of its person's other
            images and with the nearest center of another person; the threshold is at equal errors, and the images of
            lowest kappa are rejected first.
        reliability: None for a model without kappa of a von Mises-Fisher distribution.
    """

    spearman: float
    reject_area: float
    reliability: Reliability | None


class _People:
    """Images of people with at least two, with sums over each person.

    Raises:
        InputError: fewer than two people have two images.
    """

    def __init__(self, held: Held):
        people, own, counts = np.unique(held.labels, return_inverse=True, return_counts=True)
        if (counts > 1).sum() < 2:
            raise InputError(
                f"{(counts > 1).sum()} of {len(people)} people held out have two images; hold out more people, or give "
                "other data"
            )
        self.chosen = counts[own] > 1
        self.mu, self.kappa = held.mu[self.chosen].astype(np.float64), held.kappa[self.chosen].astype(np.float64)
        _, self.own = np.unique(held.labels[self.chosen], return_inverse=True)
        self.dim = held.mu.shape[1]
        self._count = self.own.max() + 1

    def sum_by_person(self, values: np.ndarray) -> np.ndarray:
        """(M, ...) -> (people, ...)."""
        sums = np.zeros((self._count, *values.shape[1:]))
        np.add.at(sums, self.own, values)
        return sums

    def lengths(self, factor: float) -> np.ndarray:
        """Returns A_d(factor kappa), (M,)."""
        return mean_resultant_length(torch.from_numpy(factor * self.kappa), self.dim).numpy()

    def fit_factor(self) -> float:
        """Returns f of the module's head.

        Raises:
            InputError: no factor between 1e-6 and 1e6 fits.
        """
        weighted = self.kappa[:, None] * self.mu
        target = (self.sum_by_person(weighted) ** 2).sum() - (weighted**2).sum()
        low, high = -_LOG_FACTOR, _LOG_FACTOR
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            expected = self.kappa * self.lengths(np.exp(middle))
            excess = (self.sum_by_person(expected) ** 2).sum() - (expected**2).sum() - target
            low, high = (middle, high) if excess < 0 else (low, middle)
        if max(abs(low), abs(high)) > _LOG_FACTOR - 1e-6:
            raise InputError(
                "no factor on kappa fits these people: their images resemble each other no more than strangers' do, or "
                "are all the same"
            )
        return float(np.exp((low + high) / 2))

    def own_cosines(self, factor: float) -> np.ndarray:
        """Returns the cosine of each image with its person's center, (M,), estimated from the others."""
        weighted, expected = self.kappa[:, None] * self.mu, self.kappa * self.lengths(factor)
        others = self.sum_by_person(weighted)[self.own] - weighted
        return (self.mu * others).sum(axis=1) / (self.sum_by_person(expected)[self.own] - expected)


def _reject_area(people: _People) -> float:
    """Returns the area under error versus reject, see :class:`Measures`."""
    sums, mu, own = people.sum_by_person(people.mu), people.mu, people.own
    rest = sums[own] - mu
    genuine = (mu * rest).sum(axis=1) / np.maximum(np.linalg.norm(rest, axis=1), 1e-30)
    centers = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)
    impostor = np.empty(len(mu))
    for start in range(0, len(mu), _ROWS):
        rows = slice(start, start + _ROWS)
        cosines = mu[rows] @ centers.T
        cosines[np.arange(len(cosines)), own[rows]] = -np.inf
        impostor[rows] = cosines.max(axis=1)
    threshold = _equal_errors(genuine, impostor)
    wrong = np.concatenate([genuine <= threshold, impostor > threshold])
    return error_versus_reject(wrong, np.concatenate([people.kappa] * 2)).area


def _equal_errors(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """Returns the score at which as large a share of genuine pairs is refused as of impostors accepted."""
    candidates = np.sort(np.concatenate([genuine, impostor]))
    refused = np.searchsorted(np.sort(genuine), candidates, side="right") / len(genuine)
    accepted = 1 - np.searchsorted(np.sort(impostor), candidates, side="right") / len(impostor)
    return float(candidates[np.abs(refused - accepted).argmin()])


def measure_reliability(held: Held) -> Reliability:
    """Compares kappa of a von Mises-Fisher distribution with the cosines of images of people held out.

    Raises:
        InputError: fewer than two people have two images, or none resemble each other.
    """
    people = _People(held)
    factor = people.fit_factor()
    return _reliability(people, people.own_cosines(factor), factor)


def _reliability(people: _People, cosines: np.ndarray, factor: float) -> Reliability:
    """Compares cosines, (M,), with what kappa says of them."""
    kappa, dim = people.kappa, people.dim
    predicted = mean_resultant_length(torch.from_numpy(kappa).double(), dim).numpy()
    rows = [
        (np.median(kappa[decile]), predicted[decile].mean(), cosines[decile].mean())
        for decile in np.array_split(np.argsort(kappa, kind="stable"), min(DECILES, len(kappa)))
    ]
    medians, means, observed = np.array(rows).T
    return Reliability(medians, means, observed, float(np.abs(means - observed).mean()), factor)


def measure(held: Held, is_vmf: bool) -> Measures:
    """Measures a model on the images of people held out.

    Args:
        is_vmf: whether kappa is that of a von Mises-Fisher distribution, and not the precision of a Gaussian.
    Raises:
        InputError: fewer than two people have two images, or none resemble each other.
    """
    people = _People(held)
    factor = people.fit_factor()
    cosines = people.own_cosines(factor)
    return Measures(
        spearman(people.kappa, cosines),
        _reject_area(people),
        _reliability(people, cosines, factor) if is_vmf else None,
    )
