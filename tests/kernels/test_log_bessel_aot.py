"""The log-Bessel kernels compiled for GPUs that need not be there: nothing spills."""

import pytest


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_kernel_spills_registers_or_uses_local_memory(architecture, compile_for_gpus):
    (usages,) = compile_for_gpus("log_bessel", [(architecture,)])
    assert len(usages) == 20 and all(usage["REG"] > 0 for usage in usages.values())
    assert not {name: usage for name, usage in usages.items() if usage["STACK"] or usage["LOCAL"]}
