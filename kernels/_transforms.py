"""The formulas of the operators under the transforms of ``torch.func`` and under forward-mode differentiation.

There the operators themselves have no derivative: a generated ``torch.library`` autograd formula knows neither
``torch.func.grad`` nor a tangent, and would let the latter vanish. The public functions come here instead
(``_common.transformed``): plain PyTorch in float64, which keeps every digit of a float32 result without the operators'
care for cancellation, on ``scf_fast.kernels.log_bessel``, which has three derivatives under any transform.
Values are not checked, since under ``vmap`` they cannot be read.
"""

import math

import torch

from scf_fast.kernels._gaussian_common import LOG_TWO_PI, hold_log_variance
from scf_fast.kernels._margin_softmax_arguments import NORM_FLOOR
from scf_fast.kernels.log_bessel import log_bessel_i, log_vmf_normalizer

# Added to a squared concentration, so that its root has derivatives at 0; 1e-15 as a concentration.
_SQUARE_FLOOR = 1e-30


def _psi(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    return -log_vmf_normalizer(kappa, dim, backend="torch") - dim / 2 * math.log(2 * math.pi)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def scf_loss_rows(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    constant: float,
    epsilon: float | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Returns the SCF loss of each row, and its terms as ``SCFTerms`` has them, in float64.

    Args:
        features, log_kappa, class_centers, labels: of ``scf_loss``, log_kappa (B,) and below its bound.
        constant: (d/2) log(2 pi) + d log r.
        epsilon: of the published normalizer; None: the exact one.
    """
    dim = features.shape[1]
    order = dim / 2 - 1
    mu, center = _unit(features.double()), _unit(class_centers[labels.long()].double())
    one_minus_cos = (mu - center).square().sum(dim=1) / 2
    kappa = log_kappa.double().exp() + (epsilon or 0.0)
    cos = 1 - one_minus_cos
    if epsilon is None:
        psi = _psi(kappa, dim)
        loss = kappa * one_minus_cos + (psi - kappa + constant)
        log_power = order * log_kappa.double()
        return loss, (cos, kappa, -kappa * cos, -log_power, psi + log_power)
    log_power = order * torch.log(epsilon + kappa)
    log_scaled = torch.log(epsilon + torch.exp(log_bessel_i(order, kappa, backend="torch") - kappa))
    loss = kappa * one_minus_cos - log_power + log_scaled + constant
    return loss, (cos, kappa, -kappa * cos, -log_power, log_scaled + kappa)


def gaussian_center_loss_rows(
    features: torch.Tensor, log_variance: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Returns the Gaussian center loss of each row, and its terms as ``GaussianTerms`` has them, in float64."""
    difference = _unit(features.double()) - _unit(class_centers[labels.long()].double())
    log_variance = hold_log_variance(log_variance)
    precision = torch.exp(-log_variance)
    cos = 1 - difference.square().sum(dim=1) / 2
    if log_variance.ndim == 1:
        log_variance = log_variance[:, None].expand_as(difference)
    squares = difference.square() * torch.exp(-log_variance)
    loss = (squares + log_variance + LOG_TWO_PI).sum(dim=1) / 2
    return loss, (cos, precision if precision.ndim == 1 else precision.mean(dim=1))


def pair_likelihood(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, radius: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the sum of the pair likelihood loss over all pairs in float64, the mean cosine of each row's pairs, its
    confidence, and the number of pairs.

    All rows are compared with all others and unequal labels left out afterwards, since under ``vmap`` labels cannot be
    read; in turns of B pairs, so that no tensor has B x B x d values.

    Args:
        features, parameter, labels: of ``pair_likelihood_loss``, log kappa below its bound.
        radius: of the vMF density; None: the Gaussian one.
    """
    units = _unit(features.double())
    batch = units.shape[0]
    loss, cosines = units.new_zeros(()), units.new_zeros(batch)
    partners = torch.zeros_like(labels)
    parameter = hold_log_variance(parameter) if radius is None else parameter.double()
    for apart in range(1, batch):
        first, second = slice(None, -apart), slice(apart, None)
        same = labels[first] == labels[second]
        difference = units[first] - units[second]
        if radius is None:
            log_sum = torch.logaddexp(parameter[first], parameter[second])
            if log_sum.ndim == 1:
                log_sum = log_sum[:, None].expand_as(difference)
            losses = (difference.square() * torch.exp(-log_sum) + log_sum + LOG_TWO_PI).sum(dim=1) / 2
        else:
            kappa = parameter.exp()
            losses = -vmf_similarity(units[first], kappa[first], units[second], kappa[second], radius)
        loss = loss + torch.where(same, losses, 0.0).sum()
        cos = torch.where(same, 1 - difference.square().sum(dim=1) / 2, 0.0)
        before, after = (0, apart), (apart, 0)
        for sides in before, after:
            cosines = cosines + torch.nn.functional.pad(cos, sides)
            partners = partners + torch.nn.functional.pad(same.to(labels.dtype), sides)
    confidence = torch.exp(-parameter if radius is None else parameter)
    confidence = confidence.mean(dim=1) if confidence.ndim == 2 else confidence
    return loss, cosines / partners.clamp(min=1), confidence, (partners.sum() // 2).long()


def vmf_similarity(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float
) -> torch.Tensor:
    """Returns the similarity of each pair of faces in float64."""
    dim = mu1.shape[1]
    vectors = []
    for mu, kappa in ((mu1.double(), kappa1.double()), (mu2.double(), kappa2.double())):
        no_direction = (mu == 0).all(dim=1, keepdim=True) & (kappa[:, None] == 0)
        vectors.append(kappa[:, None] * torch.where(no_direction, mu, _unit(torch.where(no_direction, 1.0, mu))))
    total = ((vectors[0] + vectors[1]).square().sum(dim=1) + _SQUARE_FLOOR).sqrt()
    constant = dim / 2 * math.log(2 * math.pi) + dim * math.log(radius)
    return _psi(total, dim) - _psi(kappa1.double(), dim) - _psi(kappa2.double(), dim) - constant


def pool_templates(
    mu: torch.Tensor, kappa: torch.Tensor | None, template_ids: torch.Tensor, num_templates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns directions and concentrations of templates in float64."""
    weighted = mu.double() if kappa is None else mu.double() * kappa.double()[:, None]
    sums = weighted.new_zeros(num_templates, mu.shape[1]).index_add(0, template_ids, weighted)
    empty = (sums == 0).all(dim=1)
    kappas = torch.where(empty, 0.0, torch.linalg.vector_norm(torch.where(empty[:, None], 1.0, sums), dim=1))
    return sums / torch.where(empty, 1.0, kappas)[:, None], kappas


def margin_softmax_statistics(
    embeddings: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the fields of ``MarginSoftmaxStatistics`` in float64, from all B x C cosines at once."""
    units = (
        rows.double() / torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True).clamp_min(NORM_FLOOR)
        for rows in (embeddings, class_centers)
    )
    cos = next(units) @ next(units).t()
    own = labels.clamp_min(0)[:, None]
    is_own = (torch.arange(len(class_centers), device=labels.device) == own) & (labels >= 0)[:, None]
    target = torch.where(labels >= 0, cos.gather(1, own).squeeze(1), 0.0)
    others = cos.masked_fill(is_own, -math.inf)
    if len(class_centers) > 1:
        log_sum_exp = torch.logsumexp(scale * others, dim=1)
    else:  # of nothing, whose derivative would be NaN
        log_sum_exp = torch.where(labels >= 0, -math.inf, scale * cos.squeeze(1))
    return log_sum_exp, target, others.amax(dim=1), cos.sum(dim=1)
