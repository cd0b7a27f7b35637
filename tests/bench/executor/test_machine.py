import numpy as np
import pytest
import torch

VALUES = np.random.default_rng(0).integers(0, 1 << 32, (3, 32), dtype=np.uint32)
VALUES[1, :8] = [0, 1, 31, 32, 33, 255, 2**31, 2**32 - 1]
VALUES[0, :4] = [0, 2**32 - 1, 2**31, 2**31 - 1]


def each(execute, code, *arrays, result=np.uint32):
    """``code`` of each thread computes %r9 from %r1, %r2, ..., its values in the arrays."""
    width = np.dtype(result).itemsize
    body = "".join(
        f"\tadd.s64 %rd20, %rd{i + 1}, %rd12;\n\tld.global.b32 %r{i + 1}, [%rd20];\n" for i in range(len(arrays))
    )
    register, offset = ("%r9", "%rd12") if width == 4 else ("%rd29", "%rd13")
    body += f"{code}\n\tadd.s64 %rd20, %rd0, {offset};\n\tst.global.b{8 * width} [%rd20], {register};\n"
    return execute(body, np.zeros(32, result), *arrays)[0]


def test_lanes_diverge_and_meet_again(execute):
    """Lane n doubles 1 n times."""
    body = """
	mov.b32 %r1, 1;
	mov.b32 %r2, 0;
$LOOP:
	setp.ge.u32 %p1, %r2, %r0;
	@%p1 bra $DONE;
	add.u32 %r1, %r1, %r1;
	add.u32 %r2, %r2, 1;
	bra.uni $LOOP;
$DONE:
	shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
	add.s64 %rd20, %rd0, %rd12;
	st.global.b32 [%rd20], %r3;
	"""
    (result,) = execute(body, np.zeros(32, np.uint32))
    np.testing.assert_array_equal(result, 2 ** (np.arange(32, dtype=np.uint64) ^ 1))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.u32 %r9, %r1, %r2;", lambda a, b, c: a + b),
        ("sub.u32 %r9, %r1, %r2;", lambda a, b, c: a - b),
        ("mul.lo.s32 %r9, %r1, %r2;", lambda a, b, c: a * b),
        ("mul.hi.u32 %r9, %r1, %r2;", lambda a, b, c: (a * b) >> 32),
        ("mad.lo.s32 %r9, %r1, %r2, %r3;", lambda a, b, c: a * b + c),
        ("shl.b32 %r9, %r1, %r2;", lambda a, b, c: a << b if b < 32 else 0),
        ("shr.u32 %r9, %r1, %r2;", lambda a, b, c: a >> min(b, 32)),
        ("shr.s32 %r9, %r1, %r2;", lambda a, b, c: signed(a) >> min(b, 31)),
        ("min.s32 %r9, %r1, %r2;", lambda a, b, c: min(signed(a), signed(b))),
        ("max.u32 %r9, %r1, %r2;", lambda a, b, c: max(a, b)),
        ("or.b32 %r4, %r2, 1; div.u32 %r9, %r1, %r4;", lambda a, b, c: a // (b | 1)),
        ("or.b32 %r4, %r2, 1; rem.s32 %r9, %r1, %r4;", lambda a, b, c: remainder(signed(a), signed(b | 1))),
        ("bfe.u32 %r9, %r1, 5, 9;", lambda a, b, c: a >> 5 & 511),
        ("bfe.s32 %r9, %r1, 5, 9;", lambda a, b, c: (a >> 5 & 511) - (512 if a >> 13 & 1 else 0)),
        ("popc.b32 %r9, %r1;", lambda a, b, c: bin(a).count("1")),
        ("lop3.b32 %r9, %r1, %r2, %r3, 0x96;", lambda a, b, c: a ^ b ^ c),
        ("lop3.b32 %r9, %r1, %r2, %r3, 0xE2;", lambda a, b, c: (a & b) | (c & ~b)),
        ("prmt.b32 %r9, %r1, %r2, 0x7201;", lambda a, b, c: permuted(a, b, (1, 0, 2, 7))),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", lambda a, b, c: signed(a) < signed(b)),
        ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", lambda a, b, c: a < b),
        ("cvt.s64.s32 %rd21, %r1; shr.s64 %rd22, %rd21, 4; cvt.u32.u64 %r9, %rd22;", lambda a, b, c: signed(a) >> 4),
    ],
)
def test_integers(execute, code, expected):
    result = each(execute, code, *VALUES)
    assert result.tolist() == [int(expected(*map(int, row))) % 2**32 for row in VALUES.T]


def signed(x):
    return (x ^ 2**31) - 2**31 if x < 2**32 else x


def remainder(a, b):
    return abs(a) % abs(b) * (-1 if a < 0 else 1)


def permuted(a, b, selector):
    source = [x >> 8 * i & 255 for x in (a, b) for i in range(4)]
    return sum(source[s] << 8 * i for i, s in enumerate(selector))


def test_wide_products(execute):
    result = each(execute, "\tmul.wide.s32 %rd29, %r1, %r2;", *VALUES[:2], result=np.uint64)
    assert result.tolist() == [signed(int(a)) * signed(int(b)) % 2**64 for a, b in VALUES[:2].T]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", lambda x: x[np.arange(32) ^ 5]),
        ("shfl.sync.idx.b32 %r9, %r1, 3, 31, -1;", lambda x: np.full(32, x[3])),
        ("shfl.sync.up.b32 %r9, %r1, 2, 0, -1;", lambda x: x[[0, 1, *range(30)]]),
        ("shfl.sync.down.b32 %r9, %r1, 2, 31, -1;", lambda x: x[[*range(2, 32), 30, 31]]),
        ("redux.sync.max.u32 %r9, %r1, -1;", lambda x: np.full(32, x.max())),
        ("redux.sync.min.s32 %r9, %r1, -1;", lambda x: np.full(32, x.view(np.int32).min()).view(np.uint32)),
        (
            "setp.gt.u32 %p1, %r1, 1000000000; vote.sync.ballot.b32 %r9, %p1, -1;",
            lambda x: np.full(32, sum(1 << i for i in range(32) if x[i] > 10**9)),
        ),
    ],
)
def test_between_lanes(execute, code, expected):
    np.testing.assert_array_equal(each(execute, code, VALUES[2]), expected(VALUES[2]))


FLOATS = np.array([0.0, -0.0, 1.5, -2.5, 3.5, 1e-45, 1e30, -1e30, np.inf, -np.inf, np.nan, 0.1], np.float32)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu"])
def test_comparisons_of_floats(execute, name):
    a, b = np.resize(FLOATS, 32), np.resize(np.roll(FLOATS, 5), 32)
    a[30:] = b[30:] = [7, np.nan]
    got = each(execute, f"setp.{name}.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", a, b)
    unordered = np.isnan(a) | np.isnan(b)
    operation = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name[:2]]
    np.testing.assert_array_equal(got, operation | unordered if name.endswith("u") else operation & ~unordered)


def test_conversions(execute):
    x = np.concatenate([np.random.default_rng(0).standard_normal(20).astype(np.float32), FLOATS])
    tensor = torch.from_numpy(x)
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = each(execute, f"cvt.rn.{kind}.f32 %rs1, %r1; cvt.f32.{kind} %r9, %rs1;", x)
        np.testing.assert_array_equal(got.view(np.float32), tensor.to(dtype).float().numpy())
        pair = each(execute, f"cvt.rn.{kind}x2.f32 %r9, %r1, %r2;", x, np.roll(x, 1))
        halves = torch.from_numpy(pair.view(np.uint16).astype(np.int16)).view(dtype).float().reshape(32, 2).numpy()
        np.testing.assert_array_equal(halves[:, 1], tensor.to(dtype).float().numpy())  # the first is the upper half
        np.testing.assert_array_equal(halves[:, 0], np.roll(tensor.to(dtype).float().numpy(), 1))
    for rounding, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = each(execute, f"cvt.{rounding}.s32.f32 %r9, %r1;", x).view(np.int32)
        expected = [0 if np.isnan(v) else int(np.clip(np.float64(function(v)), -(2**31), 2**31 - 1)) for v in x]
        assert got.tolist() == expected
    got = each(execute, "cvt.rna.tf32.f32 %r9, %r1;", x).view(np.float32)
    finite = np.isfinite(x) & (np.abs(x) > 1e-30)
    assert (got.view(np.uint32) & 0x1FFF)[finite].max() == 0
    got, x = got[finite], x[finite]
    assert (np.abs(got - x) <= np.abs(x) * 2.0**-11).all() and (got != x).any()


def test_what_is_not_implemented_says_so(execute):
    with pytest.raises(NotImplementedError, match=r"wgmma\.mma_async"):
        execute("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 %r1, %r0;", np.zeros(1))
