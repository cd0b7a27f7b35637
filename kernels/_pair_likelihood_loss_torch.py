"""The pair likelihood loss in plain PyTorch, in float64: the path of CPU tensors. ``pair_likelihood_loss`` has the
formulas and the operators.

Rows are sorted by label; then the pairs of a group are those of rows 1, 2, .. places apart. The pairs of one distance
are computed together: no row is twice the first of them, or twice the second, so that sums need no atomics.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from scf_fast.kernels._common import slices
from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._gaussian_common import LOG_TWO_PI, hold_log_variance
from scf_fast.kernels.debye import debye_torch

_TILE = 1 << 16  # elements: some tiles of float64 stay in the second-level cache


class PairOutputs(NamedTuple):
    """What one pass over the pairs fills, of the sum over all pairs.

    Attributes:
        loss: (B,), half of the loss of every pair that a row is in.
        slope: d loss / d parameter, of the parameter's shape.
        feature_slope: (B, d) d loss / d features, or (0, d) where not asked for.
        terms: (2, B) or (2, 0): mean cosine of the row's pairs, 0 without any, and confidence.
        partners: (B,) int64 pairs that a row is in.
    """

    loss: torch.Tensor
    slope: torch.Tensor
    feature_slope: torch.Tensor
    terms: torch.Tensor
    partners: torch.Tensor


class _Isotropic(NamedTuple):
    """Losses of pairs with one parameter a row, their slopes in both parameters, and the weight w of the gradient
    w (u1 - u2) in the direction u1.
    """

    loss: torch.Tensor
    slope1: torch.Tensor
    slope2: torch.Tensor
    weight: torch.Tensor


def _pairs(labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the first and second rows of pairs with equal labels; each row is at most once among either."""
    labels, order = torch.sort(labels, stable=True)
    for apart in itertools.count(1):
        (first,) = (labels[apart:] == labels[:-apart]).nonzero(as_tuple=True)
        if not len(first):
            return
        yield order[first], order[first + apart]


def _gaussian_pairs(
    log_variance1: torch.Tensor, log_variance2: torch.Tensor, one_minus_cos: torch.Tensor, dim: int
) -> _Isotropic:
    share1 = torch.sigmoid(log_variance1 - log_variance2)  # of the first variance in their sum
    log_sum = torch.logaddexp(log_variance1, log_variance2)
    precision = torch.exp(-log_sum)
    pull = precision * one_minus_cos
    slope = dim / 2 - pull
    return _Isotropic(pull + dim / 2 * (log_sum + LOG_TWO_PI), share1 * slope, (1 - share1) * slope, precision)


def _vmf_pairs(
    kappa1: torch.Tensor,
    kappa2: torch.Tensor,
    complement1: torch.Tensor,
    complement2: torch.Tensor,
    one_minus_cos: torch.Tensor,
    one_plus_cos: torch.Tensor,
    plan: DebyePlan,
) -> _Isotropic:
    """Without the normalizers of the two faces in the loss, which each row has once for all its pairs."""
    total, product = kappa1 + kappa2, kappa1 * kappa2
    difference = kappa1 - kappa2
    # At a length of 0 the direction of the sum has no effect.
    length = (difference.square() + 2 * product * one_plus_cos).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    of_sum = debye_torch(length, plan)
    loss = 2 * product / (length + total) * one_minus_cos - ((of_sum.psi - length) + of_sum.psi_tail)
    weight = of_sum.ratio * (product / length)
    slopes = []
    for kappa, other, complement, ahead in (
        (kappa1, kappa2, complement1, -difference),
        (kappa2, kappa1, complement2, difference),
    ):
        # length - kappa + other, without cancellation
        excess = torch.where(
            ahead >= 0, length + ahead, 2 * product * one_plus_cos / (length - torch.where(ahead >= 0, 0.0, ahead))
        )
        away = other / (length + total) * (one_minus_cos * (excess / length))  # 1 - u . e, e the direction of the sum
        slopes.append(kappa * (of_sum.complement * (1 - away) + away - complement))
    return _Isotropic(loss, slopes[0], slopes[1], weight)


def pair_likelihood_torch(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, outputs: PairOutputs, plan: DebyePlan | None
) -> None:
    """Fills the outputs; at least one row. ``plan`` is that of psi for the vMF density, None for the Gaussian one."""
    exact = PairOutputs(*(torch.zeros_like(x, dtype=torch.float64) for x in outputs))
    units = features.double()
    lengths = torch.linalg.vector_norm(units, dim=1, keepdim=True)
    units = units / lengths
    cosines = exact.loss.new_zeros(len(labels))
    if parameter.ndim == 2:
        _add_diagonal(units, hold_log_variance(parameter), labels, exact, cosines)
        confidence = torch.exp(-hold_log_variance(parameter)).mean(dim=1)
    else:
        parameter = hold_log_variance(parameter) if plan is None else parameter.double().clamp(max=plan.log_kappa_max)
        _add_isotropic(units, parameter, labels, exact, cosines, plan)
        confidence = torch.exp(-parameter if plan is None else parameter)
    if exact.feature_slope.numel():
        pull = exact.feature_slope
        along = (pull * units).sum(dim=1, keepdim=True)
        pull.addcmul_(along, units, value=-1).div_(lengths).masked_fill_((exact.partners == 0)[:, None], 0.0)
    if exact.terms.numel():
        exact.terms[0], exact.terms[1] = cosines / exact.partners.clamp(min=1), confidence
    for output, value in zip(outputs, exact):
        output.copy_(value)


def _add_isotropic(
    units: torch.Tensor,
    parameter: torch.Tensor,
    labels: torch.Tensor,
    sums: PairOutputs,
    cosines: torch.Tensor,
    plan: DebyePlan | None,
) -> None:
    """Adds all pairs to the sums, whose ``feature_slope`` gets the gradient in the unit directions."""
    dim = units.shape[1]
    rows = max(1, _TILE // dim)
    if plan is not None:
        kappa = parameter.exp()
        own = debye_torch(kappa, plan)
    for first, second in _pairs(labels):
        one_minus_cos = units.new_empty(len(first))
        one_plus_cos = units.new_empty(len(first))
        for chunk in slices(len(first), rows):
            u, v = units[first[chunk]], units[second[chunk]]
            one_minus_cos[chunk] = (u - v).square_().sum(dim=1) / 2
            one_plus_cos[chunk] = (u + v).square_().sum(dim=1) / 2
        if plan is None:
            pairs = _gaussian_pairs(parameter[first], parameter[second], one_minus_cos, dim)
        else:
            pairs = _vmf_pairs(
                kappa[first],
                kappa[second],
                own.complement[first],
                own.complement[second],
                one_minus_cos,
                one_plus_cos,
                plan,
            )
        for rows_of_side, slope in (first, pairs.slope1), (second, pairs.slope2):
            sums.loss[rows_of_side] += pairs.loss / 2
            sums.slope[rows_of_side] += slope
            sums.partners[rows_of_side] += 1
            cosines[rows_of_side] += 1 - one_minus_cos
        if sums.feature_slope.numel():
            for chunk in slices(len(first), rows):
                pull = pairs.weight[chunk, None] * (units[first[chunk]] - units[second[chunk]])
                sums.feature_slope[first[chunk]] += pull
                sums.feature_slope[second[chunk]] -= pull
    if plan is not None:
        alone = (own.psi - kappa) + own.psi_tail
        sums.loss.add_(torch.where(sums.partners > 0, sums.partners * alone, 0.0))


def _add_diagonal(
    units: torch.Tensor, log_variance: torch.Tensor, labels: torch.Tensor, sums: PairOutputs, cosines: torch.Tensor
) -> None:
    """The same for a variance in each dimension."""
    dim = units.shape[1]
    for all_first, all_second in _pairs(labels):
        for chunk in slices(len(all_first), max(1, _TILE // dim)):
            first, second = all_first[chunk], all_second[chunk]
            difference = units[first] - units[second]
            log_variance1, log_variance2 = log_variance[first], log_variance[second]
            share1 = torch.sigmoid(log_variance1 - log_variance2)
            log_sum = torch.logaddexp(log_variance1, log_variance2)
            pull = difference * torch.exp(-log_sum)
            square = pull * difference
            loss = (square.sum(dim=1) + log_sum.sum(dim=1)) / 2 + dim / 2 * LOG_TWO_PI
            slope = (1 - square) / 2
            cos = 1 - difference.square().sum(dim=1) / 2
            for rows, share, sign in (first, share1, 1), (second, 1 - share1, -1):
                sums.loss[rows] += loss / 2
                sums.slope[rows] += share * slope
                sums.partners[rows] += 1
                cosines[rows] += cos
                if sums.feature_slope.numel():
                    sums.feature_slope[rows] += sign * pull
