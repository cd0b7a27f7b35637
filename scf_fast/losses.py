"""The losses as PyTorch modules, for training loops outside this project."""

import math

import torch
from torch import nn

from scf_fast.kernels import (
    gaussian_center_loss,
    log_bessel_i,
    log_vmf_normalizer,
    pair_likelihood_loss,
    scf_loss,
)
from scf_fast.networks.confidence import DEFAULT_RADIUS
from scf_fast.objectives import Density


class SCFLoss(nn.Module):
    """SCF loss against fixed class centers, as :func:`scf_fast.kernels.scf_loss` computes it.

        loss_fn = SCFLoss(class_centers)
        features, convf = backbone(images)
        loss_fn(features, confidence_net(convf), labels).backward()

    Args:
        class_centers: (C, d) float, of any length; a buffer, so that it moves with the module, and left out of its
            state_dict.
        radius: r of the sphere.
        normalizer: ``"exact"`` or ``"published"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    class_centers: torch.Tensor

    def __init__(
        self,
        class_centers: torch.Tensor,
        radius: float = DEFAULT_RADIUS,
        normalizer: str = "exact",
        reduction: str = "mean",
    ):
        super().__init__()
        self.register_buffer("class_centers", class_centers.detach(), persistent=False)
        self.radius, self.normalizer, self.reduction = radius, normalizer, reduction

    def forward(self, features: torch.Tensor, log_kappa: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the loss, a scalar or (B,); differentiable in features and log_kappa.

        Args:
            features: (B, d) embeddings before normalization.
            log_kappa: (B,) or (B, 1).
            labels: (B,) int64 in [0, C).
        """
        loss = scf_loss(
            features,
            log_kappa,
            self.class_centers,
            labels,
            radius=self.radius,
            normalizer=self.normalizer,
            reduction=self.reduction,
        )
        assert isinstance(loss, torch.Tensor)  # a tuple only with return_terms
        return loss


class GaussianCenterLoss(nn.Module):
    """Gaussian loss against fixed class centers ("SCF-G"), by :func:`scf_fast.kernels.gaussian_center_loss`.

    Args:
        class_centers: (C, d) float, of any length; a buffer, so that it moves with the module, and left out of its
            state_dict.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    class_centers: torch.Tensor

    def __init__(self, class_centers: torch.Tensor, reduction: str = "mean"):
        super().__init__()
        self.register_buffer("class_centers", class_centers.detach(), persistent=False)
        self.reduction = reduction

    def forward(self, features: torch.Tensor, log_variance: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the loss, a scalar or (B,); differentiable in features and log_variance.

        Args:
            features: (B, d) embeddings before normalization.
            log_variance: (B,) or (B, 1), one for all dimensions, or (B, d).
            labels: (B,) int64 in [0, C).
        """
        loss = gaussian_center_loss(features, log_variance, self.class_centers, labels, reduction=self.reduction)
        assert isinstance(loss, torch.Tensor)  # a tuple only with return_terms
        return loss


class PairLikelihoodLoss(nn.Module):
    """Negative score of the pairs of images of one person in a batch ("PFE-G", "PFE-v"), as
    :func:`scf_fast.kernels.pair_likelihood_loss` computes it.

    Args:
        density: of the model.
        radius: r of the sphere, for vMF.
        reduction: ``"mean"`` over the pairs, or ``"sum"``.
    """

    def __init__(self, density: Density = Density.GAUSSIAN, radius: float = DEFAULT_RADIUS, reduction: str = "mean"):
        super().__init__()
        self.density, self.radius, self.reduction = density, radius, reduction

    def forward(self, features: torch.Tensor, parameter: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the loss, a scalar; 0 without any pair. Differentiable in features and parameter.

        Args:
            features: (B, d) embeddings before normalization.
            parameter: log kappa for vMF, (B,) or (B, 1); log variance for Gaussians, also (B, d).
            labels: (B,) int64, any numbers in any order.
        """
        loss = pair_likelihood_loss(
            features, parameter, labels, self.density.value, radius=self.radius, reduction=self.reduction
        )
        assert isinstance(loss, torch.Tensor)  # a tuple only with return_terms
        return loss


_EPSILON = 1e-6  # of the published code, in both of its logarithms; the first decides its result, see KLDiracVMF


class KLDiracVMF(nn.Module):
    """KL divergence between a Dirac at the class center and the r-radius vMF; takes and returns what the published
    class of this name does.

        losses = l1 + l2 + l3 + (d/2) log(2 pi) + d log r
        l1 = -kappa cos,  l2 = -(d/2 - 1) log kappa,  l3 = log I_(d/2-1)(kappa)

    Source: Li et al., CVPR 2021, and the class KLDiracVMF of its code.

    Args:
        z_dim: d.
        radius: r.
        normalizer: ``"exact"``; or ``"published"``, which has l3 = log(1e-6 + exp(log I - kappa)) + kappa and l2 =
            -(d/2 - 1) log(1e-6 + kappa) as that code does. At d = 512 its l3 is kappa - 13.8 up to kappa = 3000, so
            that no kappa below 255 is ever optimal.
    Raises:
        ValueError: unknown normalizer.
    """

    def __init__(self, z_dim: int, radius: float, normalizer: str = "exact"):
        super().__init__()
        if normalizer not in ("exact", "published"):
            raise ValueError(f"normalizer must be 'exact' or 'published', got {normalizer!r}")
        self.z_dim, self.radius, self.normalizer = z_dim, radius, normalizer

    def forward(
        self, mu: torch.Tensor, kappa: torch.Tensor, wc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (losses, l1, l2, l3), each (B, 1), differentiable in all arguments.

        Args:
            mu: (B, d) unit directions.
            kappa: (B, 1), positive.
            wc: (B, d) class centers of length r, the own one of each row.
        """
        d, order = self.z_dim, self.z_dim / 2 - 1
        l1 = -kappa * (mu * wc).sum(dim=1, keepdim=True) / self.radius
        log_bessel = log_bessel_i(order, kappa)
        if self.normalizer == "exact":
            losses = l1 - log_vmf_normalizer(kappa, d) + d * math.log(self.radius)
            return losses, l1, -order * torch.log(kappa), log_bessel
        l2 = -order * torch.log(_EPSILON + kappa)
        l3 = torch.log(_EPSILON + torch.exp(log_bessel - kappa)) + kappa
        return l1 + l2 + l3 + d / 2 * math.log(2 * math.pi) + d * math.log(self.radius), l1, l2, l3
