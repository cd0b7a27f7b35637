"""A record of the feature cache: what each dtype keeps."""

import pytest
import torch

from scf_fast.features.records import CacheLayout, decode, encode, encoding_error

BOUND = {
    "fp32": 0.0,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "fp8": 2.0**-4,
    "int8": 0.5 / 127,
}  # fp8: of the value; int8: of the largest value


def views(layout, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, layout.z_dim, generator=generator),
            torch.randn(rows, *layout.convf_shape, generator=generator) * 3,
        )
        for _ in range(2)
    ]


@pytest.mark.parametrize("dtype", list(BOUND))
def test_encoding_error_is_bounded(dtype):
    layout = CacheLayout(1, 8, (4, 3, 3), dtype)
    (features, convf), _ = views(layout, 16)
    got_features, got = decode(layout, encode(layout, features, convf))
    assert torch.equal(got_features, features)
    error, size = (got.float() - convf).abs(), convf.abs()
    if dtype == "int8":
        size = size.amax((1, 2, 3), keepdim=True).expand_as(size)
    smallest = (
        convf.abs().amax((1, 2, 3), keepdim=True) * 2.0**-9 if dtype == "fp8" else 0.0
    )  # below fp8's normal range the step is fixed
    assert (error <= torch.maximum(BOUND[dtype] * size * 1.001, torch.as_tensor(smallest))).all()
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_zero_map_survives_quantization():
    layout = CacheLayout(1, 2, (2, 2, 2), "int8")
    _, convf = decode(layout, encode(layout, torch.ones(1, 2), torch.zeros(1, 2, 2, 2)))
    assert torch.equal(convf, torch.zeros(1, 2, 2, 2))


@pytest.mark.parametrize("dtype, bound", [("fp32", 0.0), ("bf16", 2.0**-8), ("int8", 0.02)])
def test_what_the_dtype_loses_is_measured(dtype, bound):
    layout = CacheLayout(1, 8, (4, 3, 3), dtype)
    (features, convf), _ = views(layout, 16)
    error = encoding_error(layout, features, convf)
    assert error == 0 if bound == 0 else bound / 20 < error < bound
