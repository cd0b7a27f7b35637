"""The losses of the published table are timed if they are right, and only then."""

import pytest
import torch

from bench.kernels import objective_losses
from bench.kernels.scf_loss import fresh_class_centers


def batch_of(objective):
    torch.manual_seed(0)
    return objective_losses.fresh_batches(objective, 32, fresh_class_centers(100, "cpu"))[0]


@pytest.mark.parametrize("name", objective_losses.OBJECTIVES)
def test_every_loss_passes_its_check(name):
    """But for the compiled ones, which take the compiler's time."""
    objective = objective_losses.OBJECTIVES[name]
    for way in objective.ways.keys() - {"compiled"}:
        objective_losses.check(objective, way, batch_of(objective))


def test_a_wrong_loss_is_not_timed(monkeypatch):
    objective = objective_losses.OBJECTIVES["PFE-v"]
    monkeypatch.setitem(objective.ways, "scf_fast", lambda x, p, w, y: objective.ways["eager"](x, 1.01 * p, w, y))
    with pytest.raises(AssertionError):
        objective_losses.check(objective, "scf_fast", batch_of(objective))
