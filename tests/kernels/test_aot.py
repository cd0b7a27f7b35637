"""Every kernel of the log-Bessel family and the SCF loss compiled for real architectures, without a GPU, in a process
of its own: where the kernels are interpreted there is nothing to compile. What each takes is read from the cubin by the
cuobjdump that comes with Triton.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = [80, 90, 100]


def compile_all(architecture: int) -> dict[str, dict[str, int]]:
    """Registers, stack and local memory in bytes of each kernel, by a name that says how it was specialized."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import scf_fast.kernels.log_bessel
    import scf_fast.kernels.scf_loss  # noqa: F401

    log_bessel, loss = sys.modules["scf_fast.kernels.log_bessel"], sys.modules["scf_fast.kernels.scf_loss"]
    pointer = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}
    cuobjdump = triton.knobs.nvidia.cuobjdump.path

    def resources(kernel, signature, constants, num_warps):
        names = [name for name in signature if signature[name] != "i32"]
        aligned = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in names}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        cubin = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            report = subprocess.run(
                [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}

    results = {}
    for dtype in (torch.float32, torch.float64):
        fp64, block = dtype == torch.float64, log_bessel._BLOCK[dtype]
        outputs = dict(value_ptr=pointer[dtype], slope_ptr=pointer[dtype], count="i32")
        for dim in (2, 512):
            plan = log_bessel.debye_plan(dim / 2 - 1, dtype)
            for with_power, derivative in ((False, 0), (True, 0), (False, 1), (False, 2)):
                results[f"log_bessel d={dim} {dtype} derivative={derivative} with_power={with_power}"] = resources(
                    log_bessel._log_bessel_kernel,
                    dict(kappa_ptr=pointer[dtype], **outputs),
                    dict(PLAN=plan, NEGATE=True, WITH_POWER=with_power, DERIVATIVE=derivative, FP64=fp64, BLOCK=block),
                    log_bessel._NUM_WARPS,
                )
            results[f"inverse d={dim} {dtype}"] = resources(
                log_bessel._inverse_kernel,
                dict(rho_ptr=pointer[dtype], kappa_ptr=pointer[dtype], count="i32"),
                dict(PLAN=plan, STEPS=log_bessel._HALLEY_STEPS, FP64=fp64, BLOCK=block),
                log_bessel._NUM_WARPS,
            )

    sizes = dict(features_stride="i32", class_centers_stride="i32", B="i32", C="i32")
    rows = dict.fromkeys(("loss_ptr", "slope_ptr", "coefficients_ptr", "terms_ptr"), "*fp32")
    for dim, dtype in ((512, torch.float32), (512, torch.bfloat16), (8192, torch.float32)):
        block_d, tile_rows, num_warps = loss._tile(dim, torch.float32)
        read = dict(
            features_ptr=pointer[dtype],
            log_kappa_ptr=pointer[dtype],
            class_centers_ptr=pointer[dtype],
            labels_ptr="*i64",
        )
        for published in (False, True):
            results[f"scf_loss d={dim} {dtype} published={published}"] = resources(
                loss._scf_loss_kernel,
                {**read, **rows, **sizes},
                dict(
                    D=dim,
                    PLAN=loss._plan(dim, 64.0, published, torch.float32),
                    CONSTANT=loss._constant(dim, 64.0),
                    PUBLISHED=published,
                    MEAN=True,
                    COEFFICIENTS=True,
                    TERMS=True,
                    FP64=False,
                    ROWS=tile_rows,
                    BLOCK_D=block_d,
                ),
                num_warps,
            )
        constants = dict(GRAD_STRIDE=0, D=dim, FP64=False, BLOCK_D=block_d)
        saved = dict(
            grad_ptr="*fp32", coefficients_ptr="*fp32", features_ptr=pointer[dtype], class_centers_ptr=pointer[dtype]
        )
        results[f"feature gradient d={dim} {dtype}"] = resources(
            loss._feature_gradient_kernel,
            {**saved, "labels_ptr": "*i64", "result_ptr": pointer[dtype], **sizes},
            dict(**constants, ROWS=tile_rows),
            num_warps,
        )
        results[f"class center gradient d={dim} {dtype}"] = resources(
            loss._class_center_gradient_kernel,
            {**saved, "sorted_labels_ptr": "*i64", "order_ptr": "*i64", "result_ptr": pointer[dtype], **sizes},
            constants,
            num_warps,
        )
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_registers_or_uses_local_memory(architecture, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, __file__, str(architecture)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout)
    assert len(results) == 32 and all(r["REG"] > 0 for r in results.values())
    spilled = {name: r for name, r in results.items() if r["STACK"] or r["LOCAL"]}
    assert not spilled


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
