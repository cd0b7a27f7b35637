"""Each formula in plain PyTorch and float64, as its source states it: tests and benchmarks compare the kernels with it.

They share no code with the kernels, and are differentiable by autograd. The Bessel function is summed term by term,
about kappa / 2 terms per element, to 1e-16 of the largest logarithm among them: use kappa up to 1e5.
"""

import math

import torch
import torch.nn.functional as F


def psi(order: float, kappa: torch.Tensor) -> torch.Tensor:
    """log I_v(kappa) - v log kappa by the power series, DLMF 10.25.2."""
    kappa = kappa.double()
    largest = kappa.max().item() if kappa.numel() else 0.0
    # The largest term is at (s - v) / 2, and ten times sqrt(kappa) beyond it are twenty standard deviations.
    terms = int((math.hypot(order, largest) - order) / 2 + 10 * math.sqrt(largest)) + 40
    k = torch.arange(terms, dtype=torch.float64, device=kappa.device)
    log_terms = torch.xlogy(2 * k, kappa[..., None] / 2) - torch.lgamma(k + 1) - torch.lgamma(k + order + 1)
    return torch.logsumexp(log_terms, dim=-1) - order * math.log(2)


def log_vmf_normalizer(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """log C_d(kappa), Mardia and Jupp, Eq. (9.3.4)."""
    return -psi(dim / 2 - 1, kappa) - dim / 2 * math.log(2 * math.pi)


def mean_resultant_length(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """A_d(kappa) = I_(d/2) / I_(d/2-1), Mardia and Jupp, Eq. (9.3.7)."""
    return kappa.double() * torch.exp(psi(dim / 2, kappa) - psi(dim / 2 - 1, kappa))


def inverse_mean_resultant_length(rho: torch.Tensor, dim: int) -> torch.Tensor:
    """kappa with A_d(kappa) = rho in (0, 1), by Newton's method from Banerjee et al., Eq. (4.4)."""
    rho = rho.double()
    kappa = rho * (dim - rho**2) / (1 - rho**2)
    for _ in range(6):
        ratio = mean_resultant_length(kappa, dim)
        kappa = kappa - (ratio - rho) / (1 - ratio**2 - (dim - 1) * ratio / kappa)
    return kappa


def _directions(rows: torch.Tensor) -> torch.Tensor:
    """Rows over their lengths, however small these are."""
    return F.normalize(rows.double(), eps=0.0)


def scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = 64.0,
) -> torch.Tensor:
    """SCF loss of each row, Li et al., CVPR 2021, Eq. (8)."""
    dim = features.shape[1]
    cos = (_directions(features) * _directions(class_centers[labels])).sum(dim=1)
    kappa = log_kappa.double().exp()
    return -kappa * cos - log_vmf_normalizer(kappa, dim) + dim * math.log(radius)


def published_scf_loss(
    features: torch.Tensor,
    log_kappa: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    radius: float = 64.0,
) -> torch.Tensor:
    """SCF loss of each row as the published code computes it, its epsilon of 1e-6 included."""
    dim = features.shape[1]
    order = dim / 2 - 1
    cos = (_directions(features) * _directions(class_centers[labels])).sum(dim=1)
    kappa = log_kappa.double().exp() + 1e-6
    scaled_bessel = torch.exp(psi(order, kappa) + order * torch.log(kappa) - kappa)
    l3 = torch.log(1e-6 + scaled_bessel) + kappa
    constant = dim / 2 * math.log(2 * math.pi) + dim * math.log(radius)
    return -kappa * cos - order * torch.log(1e-6 + kappa) + l3 + constant


def gaussian_center_loss(
    features: torch.Tensor, log_variance: torch.Tensor, class_centers: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Gaussian center loss of each row: minus the log density of N(mu, s^2) at the class center, for log variances (B,)
    or (B, d).
    """
    mu, center = _directions(features), _directions(class_centers[labels])
    log_variance = log_variance.double().reshape(len(features), -1).expand_as(mu)
    return ((mu - center) ** 2 / (2 * log_variance.exp()) + log_variance / 2 + math.log(2 * math.pi) / 2).sum(dim=1)


def mutual_likelihood(
    mu1: torch.Tensor, log_variance1: torch.Tensor, mu2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """Score of each pair of faces, Shi and Jain, ICCV 2019, Eqn (3), for log variances (P,) or (P, d)."""
    u1, u2 = _directions(mu1), _directions(mu2)
    variance1, variance2 = (x.double().exp().reshape(len(u1), -1) for x in (log_variance1, log_variance2))
    v = (variance1 + variance2).expand_as(u1)
    return -((u1 - u2) ** 2 / v + v.log()).sum(dim=1) / 2 - u1.shape[1] / 2 * math.log(2 * math.pi)


def pair_likelihood_loss(
    features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor, density: str = "vmf", radius: float = 64.0
) -> torch.Tensor:
    """Mean over all pairs of equal labels of minus the score: Li et al., CVPR 2021, Eqn (13), in log kappa, or the
    mutual likelihood score in log variances.
    """
    first, second = torch.triu(labels[:, None] == labels, diagonal=1).nonzero(as_tuple=True)
    if density == "vmf":
        kappa = parameter.double().exp()
        return -vmf_similarity(features[first], kappa[first], features[second], kappa[second], radius).mean()
    return -mutual_likelihood(features[first], parameter[first], features[second], parameter[second]).mean()


def margin_softmax_loss(
    embeddings: torch.Tensor,
    class_centers: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    margins: tuple[float, float, float],
    margin_gradient: str = "exact",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, correct) from all logits; ArcFace, CosFace and SphereFace in one form, rows with label -1 left out."""
    m1, m2, m3 = margins
    cos = F.normalize(embeddings.double()) @ F.normalize(class_centers.double()).t()
    column = labels.clamp_min(0)[:, None]
    own = cos.gather(1, column)
    theta, turning = torch.acos(own), (math.pi - m2) / m1
    shifted = torch.where(theta < turning, torch.cos(m1 * theta + m2), own - math.cos(turning) - 1) - m3
    if margin_gradient == "straight_through":
        shifted = own + (shifted - own).detach()
    logits = scale * cos.scatter(1, column, shifted)
    return F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=label_smoothing), cos.argmax(1) == labels


def vmf_similarity(
    mu1: torch.Tensor, kappa1: torch.Tensor, mu2: torch.Tensor, kappa2: torch.Tensor, radius: float = 64.0
) -> torch.Tensor:
    """Score of each pair of faces, Li et al., CVPR 2021, Eq. (13)."""
    dim = mu1.shape[1]
    total = kappa1.double()[:, None] * _directions(mu1) + kappa2.double()[:, None] * _directions(mu2)
    log_c1, log_c2, log_c_sum = (log_vmf_normalizer(kappa, dim) for kappa in (kappa1, kappa2, total.norm(dim=1)))
    return log_c1 + log_c2 - log_c_sum - dim * math.log(radius)


def pool_templates(
    mu: torch.Tensor, kappa: torch.Tensor | None, template_ids: torch.Tensor, num_templates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions and concentrations of templates, Li et al., CVPR 2021, Eq. (14)."""
    weighted = mu.double() if kappa is None else kappa.double()[:, None] * mu.double()
    sums = weighted.new_zeros(num_templates, mu.shape[1]).index_add(0, template_ids, weighted)
    return F.normalize(sums), sums.norm(dim=1)
