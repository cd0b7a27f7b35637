"""Functions of the log-Bessel family are timed if they are right, and only then."""

import pytest
import torch

from bench.kernels import log_bessel


@pytest.mark.parametrize("quantity", log_bessel.FAMILY)
def test_every_function_passes_its_check(quantity):
    """All but the compiled ones, which take the compiler's time; test_baselines covers one of them."""
    torch.manual_seed(0)
    for name in log_bessel.FAMILY[quantity].keys() - {"compiled"}:
        log_bessel.check(quantity, name, log_bessel.fresh_kappas(64, "cpu")[0])


@pytest.mark.parametrize("quantity", log_bessel.FAMILY)
def test_a_wrong_function_is_not_timed(monkeypatch, quantity):
    torch.manual_seed(0)
    honest = log_bessel.FAMILY[quantity]["scf_fast"]
    monkeypatch.setitem(log_bessel.FAMILY[quantity], "scf_fast", lambda kappa: honest(1.001 * kappa))
    with pytest.raises(AssertionError):
        log_bessel.check(quantity, "scf_fast", log_bessel.fresh_kappas(64, "cpu")[0])
