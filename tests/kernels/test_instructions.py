"""The kernels as compiled for GPUs that need not be there: their instructions do not grow, their registers do not
spill, their tiles fit into shared memory.

``instruction_counts.json`` has the counts and the spills that are known; ``python -m bench.instructions --update``
writes it, for every kernel and architecture; the tests compile those that tell most in little time.
"""

import ast
import json
from pathlib import Path

import pytest
import triton

from bench.kernels.catalog import variants
from bench.kernels.instructions import COMMITTED

GROWTH = 1.03
COUNTED = [
    "log C and A, float32, d = 2",
    "log C and A, float32, d = 512",
    "A and A', float32, d = 512",
    "psi and A, float64, d = 512",
    "inverse of A, float32, d = 512",
    "SCF loss with coefficients and terms, float32, d = 512",
    "SCF loss with coefficients and terms, bfloat16, d = 512",
    "published SCF loss with coefficients and terms, float32, d = 512",
    "gradient of features, float32, d = 512",
    "gradient of class centers, a row a class, float32, d = 512",
    "Gaussian center loss with coefficients, diagonal, float32, d = 512",
    "pair likelihood, a partner a row, vmf, float32, d = 512",
    "pair likelihood, a partner a row, diagonal, float32, d = 512",
    "margin statistics, with the sum, bfloat16, d = 512",
    "gradient of cosines, bfloat16, d = 512",
    "gradient of embeddings by product, bfloat16, d = 512",
    "unit rows, bfloat16, d = 512",
    "gradient through the norm, bfloat16, d = 512",
    "all pairs, matrix, bfloat16, d = 512",
    "pairs, float64, d = 512",
    "pooling, kappa weights, float32, d = 512",
    "all pairs of Gaussians, diagonal, matrix, float32, d = 512",
    "pairs of Gaussians, scalar, float32, d = 512",
    "pooling, diagonal precisions, float32, d = 512",
]
SPILLING_SOON = [  # products of float32, and quick to compile; the others with as many registers take a minute each
    "margin statistics, float32, d = 512",
    "margin statistics, with the sum, float32, d = 512",
    "gradient of embeddings by product, skipping, float32, d = 512",
    "gradient of cosines, skipping, tf32, d = 512",
]
OTHER_ARCHITECTURES = [80, 86, 89, 100, 120]
_LEAST_SHARED = 163 * 1024  # bytes that a program may have on sm_80, the least of those with whole tensor cores


@pytest.fixture(scope="module")
def committed():
    """What is known of each kernel, {work: entry}; counts of another Triton say nothing."""
    content = json.loads(COMMITTED.read_text())
    if content["triton"] != triton.__version__:
        pytest.skip(f"the counts are those of Triton {content['triton']}, this is {triton.__version__}")
    return {entry["work"]: entry for entry in content["kernels"]}


@pytest.fixture(scope="module")
def counted(compile_for_gpus):
    return {record["work"]: record for record in compile_for_gpus(COUNTED, [90])}


@pytest.fixture(scope="module")
def others(compile_for_gpus):
    records = compile_for_gpus(SPILLING_SOON, OTHER_ARCHITECTURES)
    return {(record["work"], record["architecture"]): record for record in records}


@pytest.mark.parametrize("work", COUNTED)
def test_instructions_do_not_grow(work, counted, committed):
    known = committed[work]["instructions"]["90"]
    assert counted[work]["instructions"] <= GROWTH * known, (
        f"{work}: {counted[work]['instructions']} per {counted[work]['unit']} instead of {known}; if that is meant, "
        "run python -m bench.instructions --update"
    )


@pytest.mark.parametrize("work", COUNTED)
def test_counted_kernels_do_not_spill(work, counted):
    assert counted[work]["spilled"] == 0 and counted[work]["shared"] <= _LEAST_SHARED


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
@pytest.mark.parametrize("work", SPILLING_SOON)
def test_registers_spill_only_where_it_is_known(work, architecture, others, committed):
    assert others[work, architecture]["spilled"] <= committed[work]["spilled"].get(str(architecture), 0)


def test_products_of_half_precision_run_on_tensor_cores(counted):
    products = [variant.work for variant in variants() if variant.product and variant.work in COUNTED]
    assert len(products) == 4 and all(counted[work]["classes"]["matrix"] > 0 for work in products)


def test_diagonal_variances_take_at_most_1_5_times_their_floor(counted):
    """The floor is in the head of ``_gaussian_triton``: 6 instructions for each (row, column, dimension)."""
    work = "all pairs of Gaussians, diagonal, matrix, float32, d = 512"
    floor = next(variant.slots for variant in variants() if variant.work == work)
    assert floor == 6 and floor < counted[work]["instructions"] <= 1.5 * floor


def test_float64_pairs_touch_no_narrower_type(counted):
    assert counted["pairs, float64, d = 512"]["types"] == ["f64"]


def test_the_committed_file_has_every_kernel(committed):
    assert set(committed) == {variant.work for variant in variants()}


def test_the_catalog_has_every_kernel_that_is_launched():
    """A launch is ``name[grid](...)``."""
    launched = {
        node.func.value.id
        for path in (Path(__file__).parents[2] / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
        if node.func.value.id.endswith("_kernel")
    }
    assert launched == {variant.kernel for variant in variants()}
