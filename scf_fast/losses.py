"""The SCF loss as a module, for a training loop of one's own."""
import torch
from torch import nn

from kernels import scf_loss


class SCFLoss(nn.Module):
    """SCF loss against fixed class centers, as :func:`kernels.scf_loss` computes it.

        loss_fn = SCFLoss(class_centers)
        features, convf = backbone(images)
        loss_fn(features, confidence_net(convf), labels).backward()

    Args:
        class_centers: (C, d) float, of any length; a buffer, so that it moves with the module, and left out of its state_dict.
        radius: r of the sphere.
        normalizer: ``"exact"`` or ``"published"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    class_centers: torch.Tensor

    def __init__(self, class_centers: torch.Tensor, radius: float = 64.0, normalizer: str = "exact", reduction: str = "mean"):
        super().__init__()
        self.register_buffer("class_centers", class_centers.detach(), persistent=False)
        self.radius, self.normalizer, self.reduction = radius, normalizer, reduction

    def forward(self, features: torch.Tensor, log_kappa: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: (B, d) embeddings before normalisation.
            log_kappa: (B,) or (B, 1).
            labels: (B,) int64 in [0, C).
        Returns:
            The loss, a scalar or (B,); differentiable in features and log_kappa.
        """
        return scf_loss(features, log_kappa, self.class_centers, labels, radius=self.radius, normalizer=self.normalizer, reduction=self.reduction)
