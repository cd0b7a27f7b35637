"""The similarity and pooling kernels compiled for GPUs that need not be there: everything fits in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
# In a process of its own: kernels that were imported for the interpreter cannot be compiled.
PROGRAM = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scf_fast.kernels.debye import debye_plan

template_pooling = importlib.import_module("scf_fast.kernels.template_pooling")
vmf_similarity = importlib.import_module("scf_fast.kernels.vmf_similarity")  # the package has a function of that name

def compile_case(name, dtype, dim, arch):
    types = {"mu1_ptr": dtype, "mu2_ptr": dtype, "mu_ptr": dtype, "ids1_ptr": "*i64", "ids2_ptr": "*i64", "counts_ptr": "*i64", "best_ptr": "*i64",
             "order_ptr": "*i64", "offsets_ptr": "*i64", "constant": "fp32", "low": "fp32", "bins_per_nat": "fp32"}
    block_d = triton.next_power_of_2(dim)
    tile = dict(D=dim, PLAN=vmf_similarity._phi_plan(dim, torch.float32), PRECISION="tf32x3" if dtype == "*fp32" else "ieee", BLOCK=vmf_similarity._BLOCK,
                BLOCK_D=16 if dtype == "*fp32" else 64)
    options = dict(num_warps=vmf_similarity._NUM_WARPS, num_stages=vmf_similarity._NUM_STAGES, enable_fp_fusion=False)
    if name == "matrix":
        kernel, constants = vmf_similarity._matrix_kernel, dict(tile, GROUP=8)
    elif name == "histogram":
        kernel, constants = vmf_similarity._histogram_kernel, dict(tile, BINS=512, DISTINCT=True)
    elif name == "top_k":
        kernel, constants = vmf_similarity._top_k_kernel, dict(tile, KEPT=vmf_similarity._KEPT, BLOCK=vmf_similarity._KEPT_BLOCK)
    elif name == "pairs":
        kernel = vmf_similarity._pair_kernel
        types |= dict.fromkeys(("kappa1_ptr", "kappa2_ptr", "score_ptr"), dtype)
        rows = max(1, vmf_similarity._PAIR_TILE // block_d)
        constants = dict(CONSTANT=-2600.1, D=dim, PLAN=debye_plan(dim / 2 - 1, torch.float64), ROWS=rows, BLOCK_D=block_d)
        options = dict(num_warps=max(4, block_d // 512), enable_fp_fusion=False)
    else:
        kernel = template_pooling._pool_kernel
        constants = dict(WEIGHTED=True, TINY=1e-38, FP64=False, D=dim, ROWS=max(1, min(8, template_pooling._TILE // block_d)), BLOCK_D=block_d)
        options = dict(num_warps=4 if block_d <= 1024 else 8)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith(("_ptr", "_stride"))}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    types = sorted(set(re.findall(r"\\bf\\d\\d", compiled.asm["ttir"])))
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)} | {"shared": compiled.metadata.shared, "types": types}

print(json.dumps([compile_case(*case) for case in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def usages():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(CASES, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_in_registers(usages, case):
    usage = usages[case]
    assert usage["STACK"] == usage["LOCAL"] == 0 and 0 < usage["REG"] <= 255
    assert usage["shared"] <= 163 * 1024  # of an sm_80, the least of the three


def test_float64_pairs_touch_no_narrower_type(usages):
    assert usages["pairs", "*fp64", 512, 80]["types"] == ["f64"]
