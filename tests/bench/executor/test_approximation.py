import mpmath
import numpy as np
import pytest

from bench.executor.approximation import Approximation, Mode, TensorCores

COUNT = 64
POSITIVE = np.geomspace(1e-30, 1e30, COUNT).astype(np.float32)
EXACT = {
    "rsqrt.approx.f32": lambda x: 1 / mpmath.sqrt(x),
    "sqrt.approx.f32": mpmath.sqrt,
    "rcp.approx.f32": lambda x: 1 / x,
    "ex2.approx.f32": lambda x: mpmath.power(2, x),
    "lg2.approx.f32": lambda x: mpmath.log(x, 2),
}


def ulp(y):
    """Distance between float32 numbers at y."""
    return mpmath.mpf(float(np.spacing(np.abs(np.float32(float(y))))))


# PTX ISA 9.1, section 9.7.3
BOUNDS = {
    "rsqrt.approx.f32": lambda x, y: y * mpmath.mpf(2) ** -22.9,
    "sqrt.approx.f32": lambda x, y: y * mpmath.mpf(2) ** -23,
    "rcp.approx.f32": lambda x, y: ulp(y),
    "ex2.approx.f32": lambda x, y: 2 * ulp(y) + abs(y - float(np.float32(float(y)))),
    "lg2.approx.f32": lambda x, y: mpmath.mpf(2) ** -22 * (1 if 0.5 < x < 2 else abs(y)),
}


def run(execute, opcode, values, mode, **options):
    body = f"""
	add.s64 %rd20, %rd0, %rd12;
	ld.global.b32 %r1, [%rd20];
	{opcode} %r2, %r1;
	st.global.b32 [%rd20], %r2;
	"""
    return execute(body, values.copy(), threads=len(values), approximation=Approximation(mode, **options))[0]


@pytest.mark.parametrize("opcode", EXACT)
def test_bounds_are_held_and_reached(execute, opcode):
    values = np.linspace(-20, 20, COUNT).astype(np.float32) if opcode.startswith("ex2") else POSITIVE
    if opcode.startswith("lg2"):
        values = np.concatenate([np.geomspace(0.51, 1.99, COUNT // 2).astype(np.float32), POSITIVE[::2]])
    exact = [EXACT[opcode](mpmath.mpf(float(x))) for x in values]
    bounds = [BOUNDS[opcode](x, y) for x, y in zip(values, exact)]
    errors = {
        mode: [mpmath.mpf(float(got)) - y for got, y in zip(run(execute, opcode, values, mode), exact)] for mode in Mode
    }
    for mode, found in errors.items():
        assert all(abs(error) <= bound for error, bound in zip(found, bounds)), mode
    assert all(abs(e) <= 0.501 * ulp(y) for e, y in zip(errors[Mode.EXACT], exact))
    # A float32 within the bound that no other one passes: a rounding below it at most.
    for mode, sign in ((Mode.PLUS, 1), (Mode.MINUS, -1)):
        assert all(sign * e >= bound - 1.001 * ulp(y) for e, bound, y in zip(errors[mode], bounds, exact)), mode
    shares = [float(error / bound) for error, bound in zip(errors[Mode.RANDOM], bounds)]
    assert min(shares) < -0.4 and max(shares) > 0.4


def test_what_is_documented_to_be_exact_stays(execute):
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan] * 13, np.float32)[:COUNT]
    for mode in Mode:
        np.testing.assert_array_equal(run(execute, "ex2.approx.f32", special, mode)[:4], [1, 1, np.inf, 0])
        np.testing.assert_array_equal(run(execute, "rcp.approx.f32", special, mode)[:4], [np.inf, -np.inf, 0, 0])
        np.testing.assert_array_equal(run(execute, "lg2.approx.f32", special, mode)[:3], [-np.inf, -np.inf, np.inf])


def test_flush_to_zero(execute):
    subnormal = np.full(COUNT, 1e-40, np.float32)
    assert (run(execute, "rsqrt.approx.ftz.f32", subnormal, Mode.EXACT) == np.inf).all()
    assert np.isfinite(run(execute, "rsqrt.approx.f32", subnormal, Mode.EXACT)).all()


@pytest.mark.parametrize("mode", Mode)
def test_float64_rsqrt_is_off_by_one_float_at_most(execute, mode):
    values = np.geomspace(1e-200, 1e200, COUNT)
    body = """
	add.s64 %rd20, %rd0, %rd13;
	ld.global.b64 %rd21, [%rd20];
	rsqrt.approx.f64 %rd22, %rd21;
	st.global.b64 [%rd20], %rd22;
	"""
    (got,) = execute(body, values.copy(), threads=COUNT, approximation=Approximation(mode))
    with mpmath.workdps(40):
        nearest = np.array([float(1 / mpmath.sqrt(mpmath.mpf(float(x)))) for x in values])
    steps = np.rint((got - nearest) / np.spacing(nearest)).astype(int)
    allowed = {Mode.EXACT: {0}, Mode.PLUS: {1}, Mode.MINUS: {-1}, Mode.RANDOM: {-1, 0, 1}}[mode]
    assert set(steps.tolist()) == allowed


def test_signs_of_single_instructions(execute, make_program):
    body = """
	add.s64 %rd20, %rd0, %rd12;
	ld.global.b32 %r1, [%rd20];
	rcp.approx.f32 %r2, %r1;
	rcp.approx.f32 %r3, %r1;
	sub.f32 %r4, %r2, %r3;
	st.global.b32 [%rd20], %r4;
	"""
    program = make_program(body)
    first, second = program.sites("rcp.approx")
    values = np.linspace(1.1, 1.9, 32).astype(np.float32)
    for approximation, sign in (
        (Approximation(Mode.RANDOM), 0),  # equal operands give equal results
        (Approximation(signs={first: Mode.PLUS}), 1),
        (Approximation(Mode.PLUS, signs={first: Mode.MINUS, second: Mode.PLUS}), -1),
    ):
        (difference,) = execute(program, values.copy(), approximation=approximation)
        # Where the exact result lies close below a float32, no other one above is within the bound.
        assert set(np.sign(difference)) - {0} == ({sign} if sign else set())


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (TensorCores.EXACT, 1 + 2**-22),  # 1 + 1.75 * 2^-23, rounded
        (TensorCores.A100, 1.0),  # 2^-25 lies below the 25 bits that a term keeps beside 1
        (TensorCores.H100, 1 + 2**-23),  # it is the last of 26 bits; the sum is cut
    ],
)
def test_tensor_cores_cut(make_program, cores, expected):
    (site,) = (i for i in make_program("\tneg.f32 %r1, %r0;").instructions if i.base == "neg")
    left = np.array([[1.0] + [2.0**-12] * 7])
    right = np.array([[1.0] + [2.0**-13] * 7]).T
    product = Approximation(tensor_cores=cores).product(left, right, np.zeros((1, 1), np.float32), 8, site)
    assert product.item() == expected


def test_bounded_tensor_cores_depart_from_the_exact_sum(make_program):
    (site,) = (i for i in make_program("\tneg.f32 %r1, %r0;").instructions if i.base == "neg")
    random = np.random.default_rng(0)
    left, right = random.standard_normal((16, 16)), random.standard_normal((16, 8))
    addend = random.standard_normal((16, 8)).astype(np.float32)
    exact = left @ right + addend
    largest = np.abs(left).max(axis=1)[:, None] * np.abs(right).max(axis=0)
    largest = np.maximum(largest, np.maximum(np.abs(exact), np.abs(addend)))
    for mode, sign in ((Mode.PLUS, 1), (Mode.MINUS, -1)):
        got = Approximation(mode, TensorCores.BOUNDED).product(left, right, addend, 8, site)
        assert (sign * (got - exact) > 0).mean() > 0.95
        assert (np.abs(got - exact) <= 2 * 2.0**-23 * largest).all()
