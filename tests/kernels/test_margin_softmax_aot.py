"""The margin-softmax kernels compiled for GPUs that need not be there: no spills, tensor cores, and tiles that fit into
shared memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: kernels that were imported for the interpreter cannot be compiled.
PROGRAM = """
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scf_fast.kernels import margin_softmax as m

ALIGNED = ("padded_batch", "padded_count", "padded_rows", "left_row_stride", "left_inner_stride", "source_stride")
TYPES = {"labels_ptr": "*i64", "rows_ptr": "*i64", "used_ptr": "*i8", "scale_log2": "fp32", "skip_below": "fp32", "FLOOR": "fp32"}

def usage(kernel, operand, arch, tiles, **constants):
    names = kernel.arg_names
    types = {**TYPES, **dict.fromkeys(("embeddings_ptr", "centers_ptr", "unit_ptr", "left_ptr", "right_ptr"), operand)}
    if kernel is m._cosine_gradient_kernel:
        types["grad_ptr"] = operand
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and (n.endswith("_ptr") or n in ALIGNED)}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages) if tiles else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
    products = any(name in compiled.asm["ptx"] for name in ("mma.sync", "wgmma", "tcgen05"))
    return dict(found, kernel=kernel.fn.__name__, operand=operand, arch=arch, shared=compiled.metadata.shared, tensor_cores=products)

results = []
for arch in (80, 90, 100):
    for operand, tiles, precision in (("*bf16", m._HALF_TILES, "ieee"), ("*fp32", m._FLOAT_TILES, "ieee")):
        width = dict(WIDTH=512, PRECISION=precision)
        tile = dict(width, ROWS=tiles.rows, CLASSES=tiles.classes, STEP=tiles.width)
        product = dict(width, STEP=tiles.width, COLUMNS=128 if operand == "*bf16" else 64)
        into_rows = dict(product, left_inner_stride=1, ADD=True, ROWS=tiles.rows, INNER=tiles.classes)
        into_centers = dict(product, left_row_stride=1, ADD=False, ROWS=tiles.classes, INNER=tiles.rows)
        results += [usage(m._statistics_kernel, operand, arch, tiles, **tile, WITH_SUM=True)]
        for skip in (dict(SKIP=False, used_ptr=None), dict(SKIP=True)):
            results += [usage(m._cosine_gradient_kernel, operand, arch, tiles, **tile, **skip, UNIFORM=True)]
            results += [usage(m._product_kernel, operand, arch, tiles, **sides, **skip) for sides in (into_rows, into_centers)]
        results += [usage(m._unit_rows_kernel, operand, arch, None, GATHER=True, BLOCK_D=512, WIDTH=512),
                    usage(m._through_norm_kernel, operand, arch, None, GATHER=True, BLOCK_D=512, WIDTH=512)]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_fits(arch, compiled):
    kernels = [usage for usage in compiled if usage["arch"] == arch]
    assert len({usage["kernel"] for usage in kernels}) == 5
    for usage in kernels:
        assert usage["STACK"] == usage["LOCAL"] == 0 and 0 < usage["REG"] <= 255, usage
        assert usage["shared"] <= 163 * 1024, usage  # of an sm_80, the least of the three
        if usage["operand"] == "*bf16" and usage["kernel"] in (
            "_statistics_kernel",
            "_cosine_gradient_kernel",
            "_product_kernel",
        ):
            assert usage["tensor_cores"], usage
