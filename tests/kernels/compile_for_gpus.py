"""Compiles the kernels for GPUs that need not be there, and prints their use of registers and memory as JSON.

Tests run it in a process of its own, by the fixture of the same name, since kernels that were imported for the
interpreter cannot be compiled: ``python compile_for_gpus.py FAMILY CALLS``, a family of ``FAMILIES`` and a JSON list of
its arguments in each call. Registers, stack and local memory are read from the cubin by the cuobjdump that comes with
Triton.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

POINTER = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16"}


def load(name: str) -> Any:
    """Returns a module of the kernels, whose name may also be that of a function of the package."""
    return importlib.import_module(f"scf_fast.kernels.{name}")


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, aligned: set[str], **options: Any
) -> dict[str, Any]:
    """Compiles a kernel and returns its resources.

    Args:
        types: of parameters that are neither constants nor fp32 pointers (names that end in _ptr) nor int32.
        aligned: integer parameters that are multiples of 16; pointers always are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name in aligned)
    }
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        **{name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)},
        "kernel": kernel.fn.__name__,
        "shared": compiled.metadata.shared,
        "tensor_cores": any(name in compiled.asm["ptx"] for name in ("mma.sync", "wgmma", "tcgen05")),
        "types": sorted(set(re.findall(r"\bf\d\d", compiled.asm["ttir"]))),
    }


def compile_log_bessel(architecture: int) -> dict[str, dict[str, Any]]:
    """The kernels of log_bessel, by a name that says how each was specialized."""
    import torch

    log_bessel, debye_plan = load("log_bessel"), load("_debye_series").debye_plan
    results = {}
    for dtype in (torch.float32, torch.float64):
        pointer = POINTER[str(dtype).removeprefix("torch.")]
        types = dict.fromkeys(("kappa_ptr", "rho_ptr", "value_ptr", "slope_ptr"), pointer)
        options = dict(num_warps=log_bessel._NUM_WARPS, enable_fp_fusion=False)
        for dim in (2, 512):
            common = dict(
                PLAN=debye_plan(dim / 2 - 1, dtype), FP64=dtype == torch.float64, BLOCK=log_bessel._BLOCK[dtype]
            )
            for with_power, derivative in ((False, 0), (True, 0), (False, 1), (False, 2)):
                constants = dict(common, NEGATE=True, WITH_POWER=with_power, DERIVATIVE=derivative)
                name = f"log_bessel d={dim} {dtype} derivative={derivative} with_power={with_power}"
                results[name] = compile_kernel(
                    log_bessel._log_bessel_kernel, types, constants, architecture, set(), **options
                )
            constants = dict(common, STEPS=log_bessel._HALLEY_STEPS)
            results[f"inverse d={dim} {dtype}"] = compile_kernel(
                log_bessel._inverse_kernel, types, constants, architecture, set(), **options
            )
    return results


def compile_scf_loss(architecture: int) -> dict[str, dict[str, Any]]:
    """The kernels of scf_loss, by a name that says how each was specialized."""
    import torch

    loss, kernels = load("scf_loss"), load("_scf_loss_triton")
    results = {}
    for dim, dtype in ((512, "float32"), (512, "bfloat16"), (8192, "float32")):
        block_d, tile_rows, num_warps = kernels.tile_shape(dim, torch.float32)
        types = dict.fromkeys(("features_ptr", "log_kappa_ptr", "class_centers_ptr"), POINTER[dtype])
        types |= dict.fromkeys(("labels_ptr", "sorted_labels_ptr", "order_ptr"), "*i64")
        options = dict(num_warps=num_warps, enable_fp_fusion=False)
        common = dict(D=dim, FP64=False, BLOCK_D=block_d)
        for published in (False, True):
            constants = dict(
                common,
                PLAN=loss._loss_plan(dim, 64.0, published, torch.float32),
                CONSTANT=loss._loss_constant(dim, 64.0),
                EPSILON=loss.PUBLISHED_EPSILON,
                PUBLISHED=published,
                MEAN=True,
                COEFFICIENTS=True,
                TERMS=True,
                ROWS=tile_rows,
            )
            results[f"scf_loss d={dim} {dtype} published={published}"] = compile_kernel(
                kernels._scf_loss_kernel, types, constants, architecture, set(), **options
            )
        types["result_ptr"] = POINTER[dtype]
        results[f"feature gradient d={dim} {dtype}"] = compile_kernel(
            kernels._feature_gradient_kernel,
            types,
            dict(common, GRAD_STRIDE=0, ROWS=tile_rows),
            architecture,
            set(),
            **options,
        )
        results[f"class center gradient d={dim} {dtype}"] = compile_kernel(
            kernels._class_center_gradient_kernel, types, dict(common, GRAD_STRIDE=0), architecture, set(), **options
        )
    return results


def compile_margin_softmax(architecture: int, operand: str) -> list[dict[str, Any]]:
    """Every kernel of margin_softmax, in each of its variants."""
    kernels, passes = load("_margin_softmax_kernels"), load("_margin_softmax_triton")
    tiles, columns = (passes._HALF_TILES, 128) if operand == "*bf16" else (passes._FLOAT_TILES, 64)
    aligned = {"padded_batch", "padded_count", "padded_rows", "left_row_stride", "left_inner_stride", "source_stride"}
    types = {"labels_ptr": "*i64", "rows_ptr": "*i64", "used_ptr": "*i8"}
    types |= dict.fromkeys(("scale_log2", "skip_below", "FLOOR"), "fp32")
    types |= dict.fromkeys(("embeddings_ptr", "centers_ptr", "unit_ptr", "left_ptr", "right_ptr"), operand)

    def compile_tiles(kernel, **constants):
        of_kernel = {**types, "grad_ptr": operand} if kernel is kernels.cosine_gradient_kernel else types
        options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
        if kernel is kernels.product_kernel:
            options["maxnreg"] = passes.PRODUCT_REGISTERS
        return compile_kernel(kernel, of_kernel, constants, architecture, aligned, **options)

    def compile_rows(kernel):
        return compile_kernel(kernel, types, dict(GATHER=True, BLOCK_D=512, WIDTH=512), architecture, aligned)

    width = dict(WIDTH=512, PRECISION="ieee", STEP=tiles.width)
    tile = dict(width, ROWS=tiles.rows, CLASSES=tiles.classes)
    into_rows = dict(left_inner_stride=1, ADD=True, ROWS=tiles.rows, INNER=tiles.classes)
    into_centers = dict(left_row_stride=1, ADD=False, ROWS=tiles.classes, INNER=tiles.rows)
    results = [compile_tiles(kernels.statistics_kernel, **tile, WITH_SUM=True)]
    for skip in (dict(SKIP=False, used_ptr=None), dict(SKIP=True)):
        results.append(compile_tiles(kernels.cosine_gradient_kernel, **tile, **skip, UNIFORM=True))
        for sides in (into_rows, into_centers):
            results.append(compile_tiles(kernels.product_kernel, **width, COLUMNS=columns, **sides, **skip))
    return [*results, compile_rows(kernels.unit_rows_kernel), compile_rows(kernels.through_norm_kernel)]


def compile_similarity(name: str, pointer: str, dim: int, architecture: int) -> dict[str, Any]:
    """One kernel of vmf_similarity, vmf_similarity_tiles or template_pooling."""
    import torch
    import triton

    tiles, pairs, pooling = load("_vmf_similarity_triton"), load("vmf_similarity"), load("template_pooling")
    types = dict.fromkeys(("mu1_ptr", "mu2_ptr", "mu_ptr"), pointer)
    types |= dict.fromkeys(("ids1_ptr", "ids2_ptr", "counts_ptr", "best_ptr", "order_ptr", "offsets_ptr"), "*i64")
    types |= dict.fromkeys(("constant", "low", "bins_per_nat"), "fp32")
    aligned = {"mu1_stride", "mu2_stride", "mu_stride", "padded1", "padded2"}
    block_d = triton.next_power_of_2(dim)
    tile = dict(
        D=dim,
        PLAN=load("_phi_triton").phi_kernel_plan(dim),
        SPLIT=pointer == "*fp32",
        BLOCK=tiles._BLOCK,
        BLOCK_D=tiles._BLOCK_D[torch.bfloat16 if pointer == "*bf16" else torch.float16],
    )
    options = tiles._MATRIX_OPTIONS
    if name in ("matrix", "histogram", "top_k") and pointer == "*fp32":
        types |= dict.fromkeys(("mu1_ptr", "mu2_ptr"), "*fp16")  # each number in two parts
    if name == "matrix":
        kernel, constants = tiles._matrix_kernel, dict(tile, GROUP=8)
    elif name == "histogram":
        kernel, constants = tiles._histogram_kernel, dict(tile, BINS=512, DISTINCT=True)
        options = tiles._HISTOGRAM_OPTIONS
    elif name == "top_k":
        kernel, constants = tiles._top_k_kernel, dict(tile, KEPT=tiles.KEPT, BLOCK=tiles._KEPT_BLOCK)
        options = tiles.top_k_options(architecture // 10)
    elif name == "pairs":
        kernel = pairs._pair_kernel
        types |= dict.fromkeys(("kappa1_ptr", "kappa2_ptr", "score_ptr"), pointer)
        plan = load("_debye_series").debye_plan(dim / 2 - 1, torch.float64)
        rows = max(1, pairs._PAIR_TILE // block_d)
        constants = dict(CONSTANT=-2600.1, D=dim, PLAN=plan, ROWS=rows, BLOCK_D=block_d)
        options = dict(num_warps=max(4, block_d // 512), enable_fp_fusion=False)
    else:
        kernel = pooling._pool_kernel
        rows = max(1, min(8, pooling._TILE // block_d))
        constants = dict(WEIGHTED=True, TINY=1e-38, FP64=False, D=dim, ROWS=rows, BLOCK_D=block_d)
        options = dict(num_warps=4 if block_d <= 1024 else 8)
    return compile_kernel(kernel, types, constants, architecture, aligned, **options)


FAMILIES = {
    "log_bessel": compile_log_bessel,
    "scf_loss": compile_scf_loss,
    "margin_softmax": compile_margin_softmax,
    "similarity": compile_similarity,
}

if __name__ == "__main__":
    print(json.dumps([FAMILIES[sys.argv[1]](*arguments) for arguments in json.loads(sys.argv[2])]))
