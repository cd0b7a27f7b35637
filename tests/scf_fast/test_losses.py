"""The losses as modules; test_published_files has KLDiracVMF."""

import pytest
import torch

from scf_fast.kernels import reference
from scf_fast.losses import GaussianCenterLoss, PairLikelihoodLoss, SCFLoss
from scf_fast.objectives import Density

GENERATOR = torch.Generator().manual_seed(0)
FEATURES, CENTERS = torch.randn(6, 8, generator=GENERATOR), torch.randn(3, 8, generator=GENERATOR)
SCALAR, DIAGONAL = torch.randn(6, generator=GENERATOR), torch.randn(6, 8, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def close(loss, expected):
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameter", [SCALAR, DIAGONAL], ids=["scalar", "diagonal"])
def test_losses_of_gaussians(parameter):
    rows = reference.gaussian_center_loss(FEATURES, parameter, CENTERS, LABELS)
    close(GaussianCenterLoss(CENTERS)(FEATURES, parameter, LABELS), rows.mean())
    close(GaussianCenterLoss(CENTERS, "none")(FEATURES, parameter, LABELS), rows)
    pairs = reference.pair_likelihood_loss(FEATURES, parameter, LABELS, "gaussian")
    close(PairLikelihoodLoss()(FEATURES, parameter, LABELS), pairs)
    close(PairLikelihoodLoss(reduction="sum")(FEATURES, parameter, LABELS), 4 * pairs)  # 3 pairs and 1


def test_losses_on_the_sphere():
    pairs = reference.pair_likelihood_loss(FEATURES, SCALAR, LABELS, "vmf", 2.0)
    close(PairLikelihoodLoss(Density.VMF, 2.0)(FEATURES, SCALAR[:, None], LABELS), pairs)
    rows = reference.scf_loss(FEATURES, SCALAR, CENTERS, LABELS, 2.0)
    close(SCFLoss(CENTERS, 2.0)(FEATURES, SCALAR, LABELS), rows.mean())


def test_class_centers_move_with_the_module_and_are_not_saved():
    module = GaussianCenterLoss(CENTERS.requires_grad_(False)).double()
    assert module.class_centers.dtype == torch.float64 and not module.state_dict()
