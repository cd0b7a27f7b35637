"""The pair likelihood loss in plain PyTorch: the path of CPU tensors. ``pair_likelihood_loss`` has the
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

_TILE = 1 << 16  # elements: some tiles stay in the second-level cache


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


def _row_lengths(rows: torch.Tensor) -> torch.Tensor:
    """Returns the length of each row, (B, 1), of those whose squares leave float32 from float64; in float64."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).double()
    (extreme,) = ((lengths < 2.0**-40) | (lengths > 2.0**40)).squeeze(1).nonzero(as_tuple=True)
    if len(extreme):
        lengths[extreme] = torch.linalg.vector_norm(rows[extreme], dim=1, keepdim=True, dtype=torch.float64)
    return lengths


def pair_likelihood_torch(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, outputs: PairOutputs, plan: DebyePlan | None
) -> None:
    """Fills the outputs; at least one row. ``plan`` is that of psi for the vMF density, None for the Gaussian one."""
    for output in outputs:
        output.zero_()
    loss, cosines = (torch.zeros_like(outputs.loss, dtype=torch.float64) for _ in range(2))
    dtype = outputs.loss.dtype
    features = features.to(dtype)
    lengths = _row_lengths(features)
    units = None
    extreme = bool(((lengths < 2.0**-40) | (lengths > 2.0**40)).any())
    if extreme or outputs.feature_slope.numel() or parameter.ndim == 2:
        units = torch.empty_like(features)
        for chunk in slices(len(labels), max(1, _TILE // features.shape[1])):
            units[chunk] = features[chunk] / lengths[chunk]
    if parameter.ndim == 2:
        assert units is not None
        variance = hold_log_variance(parameter.to(units.dtype)).exp_()
        _add_diagonal(units, variance, labels, outputs, loss, cosines)
        confidence = variance.reciprocal_().mean(dim=1) if outputs.terms.numel() else loss
    else:
        parameter = (
            hold_log_variance(parameter.double()) if plan is None else parameter.double().clamp(max=plan.log_kappa_max)
        )
        rows = (
            (features, lengths.to(dtype)) if units is None or not extreme else (units, torch.ones_like(features[:, :1]))
        )
        _add_isotropic(*rows, units, parameter, labels, outputs, loss, cosines, plan)
        confidence = torch.exp(-parameter if plan is None else parameter)
    outputs.loss.copy_(loss)
    if outputs.feature_slope.numel():
        assert units is not None
        pull = outputs.feature_slope
        pull.addcmul_((pull * units).sum(dim=1, keepdim=True), units, value=-1).div_(lengths)
        pull.masked_fill_((outputs.partners == 0)[:, None], 0.0)
    if outputs.terms.numel():
        outputs.terms[0], outputs.terms[1] = cosines / outputs.partners.clamp(min=1), confidence


def _add_isotropic(
    features: torch.Tensor,
    lengths: torch.Tensor,
    units: torch.Tensor | None,
    parameter: torch.Tensor,
    labels: torch.Tensor,
    outputs: PairOutputs,
    loss: torch.Tensor,
    cosines: torch.Tensor,
    plan: DebyePlan | None,
) -> None:
    """Adds all pairs to the outputs, whose ``feature_slope`` gets the gradient in the unit directions where there are
    any, and to loss and cosines.
    """
    dim = features.shape[1]
    slope = torch.zeros_like(loss)
    if plan is not None:
        kappa = parameter.exp()
        own = debye_torch(kappa, plan)
    for first, second in _pairs(labels):
        one_minus_cos = _one_minus_cosine(features, lengths, first, second)
        if plan is None:
            pairs = _gaussian_pairs(parameter[first], parameter[second], one_minus_cos, dim)
        else:
            pairs = _vmf_pairs(
                kappa[first],
                kappa[second],
                own.complement[first],
                own.complement[second],
                one_minus_cos,
                _one_plus_cosine(features, first, second, one_minus_cos),
                plan,
            )
        for rows, slopes in (first, pairs.slope1), (second, pairs.slope2):
            loss[rows] += pairs.loss / 2
            slope[rows] += slopes
            outputs.partners[rows] += 1
            cosines[rows] += 1 - one_minus_cos
        if units is not None and outputs.feature_slope.numel():
            for chunk in slices(len(first), max(1, _TILE // dim)):
                pull = units.index_select(0, first[chunk]).sub_(units.index_select(0, second[chunk]))
                pull.mul_(pairs.weight[chunk, None])
                outputs.feature_slope.index_add_(0, first[chunk], pull)
                outputs.feature_slope.index_add_(0, second[chunk], pull, alpha=-1)
    if plan is not None:
        alone = (own.psi - kappa) + own.psi_tail
        loss.add_(torch.where(outputs.partners > 0, outputs.partners * alone, 0.0))
    outputs.slope.copy_(slope)


def _one_minus_cosine(
    features: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Returns 1 - cos in float64: |f1 - r f2|^2 / (2 |f1|^2) with r = |f1| / |f2|."""
    distance = features.new_empty(len(first), dtype=torch.float64)
    for chunk in slices(len(first), max(1, _TILE // features.shape[1])):
        f, c = features.index_select(0, first[chunk]), features.index_select(0, second[chunk])
        length = lengths[first[chunk]]
        f.addcmul_(c, length / lengths[second[chunk]], value=-1)
        distance[chunk] = torch.linalg.vector_norm(f, dim=1) / length.squeeze(1)
    return distance.square_().div_(2)


def _one_plus_cosine(
    features: torch.Tensor, first: torch.Tensor, second: torch.Tensor, one_minus_cos: torch.Tensor
) -> torch.Tensor:
    """Returns 1 + cos, of opposite directions from their sum, where 2 - (1 - cos) cancels."""
    one_plus_cos = 2 - one_minus_cos
    (opposite,) = (one_minus_cos > 1.5).nonzero(as_tuple=True)
    for chunk in slices(len(opposite), max(1, _TILE // features.shape[1])):
        u, v = (
            torch.nn.functional.normalize(features[rows[opposite[chunk]]].double(), eps=0.0) for rows in (first, second)
        )
        one_plus_cos[opposite[chunk]] = (u + v).square_().sum(dim=1) / 2
    return one_plus_cos


def _add_diagonal(
    units: torch.Tensor,
    variance: torch.Tensor,
    labels: torch.Tensor,
    outputs: PairOutputs,
    loss: torch.Tensor,
    cosines: torch.Tensor,
) -> None:
    """The same for a variance in each dimension."""
    dim = units.shape[1]
    for all_first, all_second in _pairs(labels):
        for chunk in slices(len(all_first), max(1, _TILE // dim)):
            first, second = all_first[chunk], all_second[chunk]
            difference = units.index_select(0, first).sub_(units.index_select(0, second))
            variance1, variance2 = variance.index_select(0, first), variance.index_select(0, second)
            total = variance1 + variance2
            pull = difference / total
            square = pull * difference
            losses = (square.sum(dim=1) + total.log().sum(dim=1)).double() / 2 + dim / 2 * LOG_TWO_PI
            cos = 1 - difference.square().sum(dim=1).double() / 2
            slope = square.neg_().add_(1).div_(2)
            for rows, of_side, sign in (first, variance1, 1), (second, variance2, -1):
                loss[rows] += losses / 2
                outputs.partners[rows] += 1
                cosines[rows] += cos
                outputs.slope.index_add_(0, rows, of_side.div_(total).mul_(slope))
                if outputs.feature_slope.numel():
                    outputs.feature_slope.index_add_(0, rows, pull, alpha=sign)
