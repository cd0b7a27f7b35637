import numpy as np
import pytest
import torch

from bench.executor.approximation import Approximation, TensorCores

LANES = np.arange(32)
GROUP, THREAD = np.divmod(LANES, 4)


def layout(kind):
    """Rows and columns of each register element by lane (PTX ISA 9.1, 9.7.14.5): A, B and C, (elements, 32) each."""
    if kind == "tf32":
        a = [(GROUP + 8 * (i % 2), THREAD + 4 * (i // 2)) for i in range(4)]
        b = [(THREAD + 4 * i, GROUP) for i in range(2)]
    else:
        a = [(GROUP + 8 * (i // 2 % 2), 2 * THREAD + i % 2 + 8 * (i // 4)) for i in range(8)]
        b = [(2 * THREAD + i % 2 + 8 * (i // 2), GROUP) for i in range(4)]
    return a, b, [(GROUP + 8 * (i // 2), 2 * THREAD + i % 2) for i in range(4)]


def fragment(matrix, places, dtype):
    """The registers of all lanes, (32, registers of 4 bytes)."""
    elements = np.stack([matrix[rows, columns] for rows, columns in places], axis=1)
    return torch.from_numpy(elements).to(dtype).contiguous().view(torch.uint8).numpy().view(np.uint32)


@pytest.mark.parametrize(
    ("kind", "inner", "dtype"), [("bf16", 16, torch.bfloat16), ("f16", 16, torch.float16), ("tf32", 8, torch.float32)]
)
@pytest.mark.parametrize("cores", [TensorCores.EXACT, TensorCores.A100, TensorCores.H100])
def test_mma_against_numpy(execute, kind, inner, dtype, cores):
    random = np.random.default_rng(1)
    a, b = random.integers(-7, 8, (16, inner)) / 4, random.integers(-7, 8, (inner, 8)) / 2  # exact in every type
    c = random.standard_normal((16, 8)).astype(np.float32)
    places = layout(kind)
    fragments = [
        fragment(a, places[0], dtype),
        fragment(b, places[1], dtype),
        fragment(c, places[2], torch.float32),
    ]
    names = iter(f"%r{i}" for i in range(1, 20))
    registers = [[next(names) for _ in range(x.shape[1])] for x in fragments]
    body = ""
    for i, (x, of_matrix) in enumerate(zip(fragments, registers)):
        body += f"\tmul.lo.s64 %rd20, %rd10, {4 * x.shape[1]};\n\tadd.s64 %rd20, %rd20, %rd{i};\n"
        body += "".join(f"\tld.global.b32 {name}, [%rd20+{4 * k}];\n" for k, name in enumerate(of_matrix))
    operands = ", ".join("{" + ", ".join(names) + "}" for names in (registers[2], *registers))
    body += f"\tmma.sync.aligned.m16n8k{inner}.row.col.f32.{kind}.{kind}.f32 {operands};\n"
    body += "".join(f"\tst.global.b32 [%rd20+{4 * k}], {name};\n" for k, name in enumerate(registers[2]))
    *_, result = execute(body, *fragments, approximation=Approximation(tensor_cores=cores))
    got = np.empty((16, 8), np.float32)
    for element, (rows, columns) in enumerate(places[2]):
        got[rows, columns] = result.view(np.float32)[:, element]
    if cores is TensorCores.EXACT:
        np.testing.assert_array_equal(got, (a @ b + c).astype(np.float32))
    else:  # cut at the 24 bits of the largest sum and term, up to 64, in each of four steps at most
        np.testing.assert_allclose(got, a @ b + c, rtol=0, atol=4 * 64 * 2.0**-23)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_hands_each_lane_its_pair(execute, transposed):
    """Lane l gets elements (l / 4, 2 (l % 4)) and the next of each 8 x 8 matrix, or of the transposed one."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    trans = ".trans" if transposed else ""
    body = f"""
	shl.b32 %r1, %r0, 4;
	cvt.u64.u32 %rd20, %r1;
	add.s64 %rd21, %rd0, %rd20;
	ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd21];
	st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
	ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
	st.global.v4.b32 [%rd21], {{%r2, %r3, %r4, %r5}};
	"""
    (result,) = execute(body, matrices.copy(), shared=512)
    got = result.reshape(32, 4, 2)  # lane, matrix, half
    source = matrices.swapaxes(1, 2) if transposed else matrices
    for k in range(2):
        np.testing.assert_array_equal(got[:, :, k], source[:, GROUP, 2 * THREAD + k].T)
