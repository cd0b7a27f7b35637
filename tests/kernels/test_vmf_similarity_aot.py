"""The similarity and pooling kernels compiled for GPUs that need not be there: everything fits in registers."""

import pytest

CASES = [  # kernel, type of mu, dim, architecture
    ("matrix", "*bf16", 512, 90),
    ("matrix", "*fp32", 512, 80),
    ("histogram", "*bf16", 512, 100),
    ("top_k", "*fp32", 512, 80),
    ("top_k", "*bf16", 512, 90),
    ("pairs", "*fp64", 512, 80),
    ("pairs", "*fp32", 8192, 90),
    ("pool", "*fp32", 512, 100),
    ("pool", "*fp32", 8192, 80),
]


@pytest.fixture(scope="module")
def usages(compile_for_gpus):
    return dict(zip(CASES, compile_for_gpus("similarity", CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_in_registers(usages, case):
    usage = usages[case]
    assert usage["STACK"] == usage["LOCAL"] == 0 and 0 < usage["REG"] <= 255
    assert usage["shared"] <= 163 * 1024  # of an sm_80, the least of the three


def test_float64_pairs_touch_no_narrower_type(usages):
    assert usages["pairs", "*fp64", 512, 80]["types"] == ["f64"]
