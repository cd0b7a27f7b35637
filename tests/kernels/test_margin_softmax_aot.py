"""The margin-softmax kernels compiled for GPUs that need not be there: no spills, tensor cores, and tiles that fit into
shared memory.
"""

import pytest

CASES = [(architecture, operand) for architecture in (80, 90, 100) for operand in ("*bf16", "*fp32")]


@pytest.fixture(scope="module")
def all_usages(compile_for_gpus):
    return dict(zip(CASES, compile_for_gpus("margin_softmax", CASES), strict=True))


@pytest.mark.parametrize(("architecture", "operand"), CASES)
def test_every_kernel_fits(architecture, operand, all_usages):
    usages = all_usages[architecture, operand]
    products = {"statistics_kernel", "cosine_gradient_kernel", "product_kernel"}
    assert {usage["kernel"] for usage in usages} == products | {"unit_rows_kernel", "through_norm_kernel"}
    for usage in usages:
        assert usage["STACK"] == usage["LOCAL"] == 0 and 0 < usage["REG"] <= 255, usage
        assert usage["shared"] <= 163 * 1024, usage  # of an sm_80, the least of the three
        if operand == "*bf16" and usage["kernel"] in products:
            assert usage["tensor_cores"], usage
