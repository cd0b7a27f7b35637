import math

import numpy as np
import pytest
import torch

from scf_fast.kernels._debye_series import DebyePlan
from scf_fast.kernels._phi_triton import phi_kernel_plan
from scf_fast.kernels._vmf_common import phi


@pytest.mark.parametrize("dim", [37, 64, 512, 8192])
def test_plan_has_phi_to_3e_7_nats(dim):
    """The formula of the module in float64, with the constants of the plan, against PyTorch's phi."""
    plan, kappa = phi_kernel_plan(dim), np.append(0.0, np.logspace(-6, 6, 400))
    m = plan.order
    s = np.hypot(m, kappa)
    octaves = np.floor(np.log2((m + s) / (math.sqrt(2) * m)))
    f = (m + s) / (2 * m) * 2.0**-octaves
    assert (f >= math.sqrt(0.5)).all() and (f < math.sqrt(2)).all()
    w = (f - 1) / (f + 1)
    logarithm = octaves * plan.octave * 2**23 + w * np.polyval(plan.logarithm, w * w)
    ours = s - m - logarithm + np.polyval((*plan.phase, plan.phase_constant), m / s)
    assert (np.abs(ours - phi(torch.from_numpy(kappa), dim).numpy()) <= 3e-7 + 1e-8 * kappa).all()


def test_orders_that_need_the_recurrence_keep_the_general_form():
    assert isinstance(phi_kernel_plan(8), DebyePlan)
