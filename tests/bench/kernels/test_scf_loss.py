"""SCF losses are timed if they are right, and only then."""

import pytest
import torch

from bench.kernels import scf_loss


@pytest.mark.parametrize("name", ["scf_fast", "scf_fast_published", "published", "eager"])
def test_every_loss_passes_its_check(name):
    torch.manual_seed(0)
    class_centers = scf_loss.fresh_class_centers(100, "cpu")
    scf_loss.check(name, scf_loss.fresh_batches(32, class_centers, finetune=False)[0])


def test_a_wrong_loss_is_not_timed(monkeypatch):
    torch.manual_seed(0)
    class_centers = scf_loss.fresh_class_centers(100, "cpu")
    batch = scf_loss.fresh_batches(32, class_centers, finetune=False)[0]
    honest = scf_loss.LOSSES["published"]
    monkeypatch.setitem(scf_loss.LOSSES, "scf_fast", lambda *inputs: honest(*inputs))
    with pytest.raises(AssertionError):
        scf_loss.check("scf_fast", batch)
