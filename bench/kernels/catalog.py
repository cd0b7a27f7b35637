"""Every kernel of kernels/ as the public functions launch it, with what one program computes.

The tests that compile kernels and ``bench.kernels.instructions`` go through this one list. float16 is left out where
bfloat16 is there: but for the type of a conversion or a product the code is the same.

Over 450 lines because it is a list, one entry a kernel and form.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from bench.kernels.variant import Arguments, Product, Variant
from scf_fast import kernels
from scf_fast.kernels._gaussian_triton import FACTORS, SHORT_SUM
from scf_fast.kernels.log_bessel import Function, _log_bessel

BATCH, CLASSES = 1024, 4096
# Sets of faces are of any size, batches mostly multiples of 16, for which Triton compiles shorter addresses.
PROBES, GALLERY = 1000, 1500
TILES = 16  # that a program of the statistics or of top-k goes through; hundreds where there are many classes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _block(arguments: Arguments) -> float:
    return arguments["BLOCK"]


def _rows_of_d(arguments: Arguments) -> float:
    """Returns the elements of the rows that a program computes."""
    return arguments.get("ROWS", 1) * arguments["D"]


def _rows_of_d_by_16(arguments: Arguments) -> float:
    """Returns how often a program has 16 elements of each of its two inputs: what a thread holds at d = 512."""
    return _rows_of_d(arguments) / 16


# ---- log-Bessel family


_LOG_BESSEL = {
    "psi and A": (Function.PSI, 0),
    "log I and its slope": (Function.LOG_BESSEL_I, 0),
    "log C and A": (Function.LOG_VMF_NORMALIZER, 0),
    "A and A'": (Function.PSI, 1),
    "A' and A''": (Function.PSI, 2),
}
"""{what is computed: (function, derivative)}"""


def _log_bessel_variants() -> Iterator[Variant]:
    for dtype in (torch.float32, torch.float64):
        for dim in (2, 512):
            kappa = torch.ones(1 << 14, dtype=dtype)
            for shown, (function, derivative) in _LOG_BESSEL.items():
                yield Variant(
                    f"{shown}, {_name(dtype)}, d = {dim}",
                    "_log_bessel_kernel",
                    functools.partial(_log_bessel, kappa, dim / 2 - 1, int(function), derivative, True, False),
                    "element",
                    _block,
                    nbytes=3 * dtype.itemsize,
                )
            yield Variant(
                f"inverse of A, {_name(dtype)}, d = {dim}",
                "_inverse_kernel",
                functools.partial(kernels.inverse_mean_resultant_length, 0.5 * kappa, dim, backend="triton"),
                "element",
                _block,
                nbytes=2 * dtype.itemsize,
                turns=2,
            )


# ---- SCF loss


def _scf_loss(dim: int, dtype: torch.dtype, finetune: bool, centers: bool = False, **options: Any) -> None:
    batch = BATCH if dim <= 1024 else 64
    features = torch.zeros(batch, dim, dtype=dtype, requires_grad=finetune)
    class_centers = torch.zeros(CLASSES if dim <= 1024 else 64, dim, dtype=dtype, requires_grad=centers)
    log_kappa = torch.zeros(batch, requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    result = kernels.scf_loss(features, log_kappa, class_centers, labels, backend="triton", **options)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()


def _scf_loss_variants() -> Iterator[Variant]:
    for dim, dtype in (
        (512, torch.float32),
        (512, torch.bfloat16),
        (512, torch.float64),
        (8192, torch.float32),
    ):
        label, size = f"{_name(dtype)}, d = {dim}", dtype.itemsize
        for normalizer, finetune, shown in (
            ("exact", True, "SCF loss with coefficients and terms"),
            ("exact", False, "SCF loss"),
            ("published", True, "published SCF loss with coefficients and terms"),
        ):
            yield Variant(
                f"{shown}, {label}",
                "_scf_loss_kernel",
                functools.partial(_scf_loss, dim, dtype, finetune, normalizer=normalizer, return_terms=finetune),
                "16 features",
                _rows_of_d_by_16,
                nbytes=2 * 16 * size,
            )
        yield Variant(
            f"gradient of features, {label}",
            "_feature_gradient_kernel",
            functools.partial(_scf_loss, dim, dtype, True),
            "element",
            _rows_of_d,
            nbytes=3 * size,
        )
        yield Variant(
            f"gradient of class centers, a row a class, {label}",
            "_class_center_gradient_kernel",
            functools.partial(_scf_loss, dim, dtype, True, True),
            "element",
            _rows_of_d,
            nbytes=3 * size,
        )


# ---- losses of Gaussians, and of pairs


def _gaussian_center_loss(dim: int, dtype: torch.dtype, diagonal: bool, finetune: bool) -> None:
    batch = BATCH if dim <= 1024 else 64
    features, class_centers = (torch.zeros(batch, dim, dtype=dtype, requires_grad=finetune) for _ in range(2))
    log_variance = torch.zeros((batch, dim) if diagonal else (batch,), requires_grad=True)
    labels = torch.zeros(batch, dtype=torch.int64)
    kernels.gaussian_center_loss(features, log_variance, class_centers, labels, backend="triton").backward()


def _pair_likelihood_loss(dim: int, dtype: torch.dtype, density: str, diagonal: bool) -> None:
    batch = BATCH if dim <= 1024 else 64
    features = torch.zeros(batch, dim, dtype=dtype, requires_grad=True)
    parameter = torch.zeros((batch, dim) if diagonal else (batch,), requires_grad=True)
    labels = torch.arange(batch) // 4
    kernels.pair_likelihood_loss(features, parameter, labels, density, return_terms=True, backend="triton")


def _one(arguments: Arguments) -> float:
    return 1.0


def _objective_variants() -> Iterator[Variant]:
    for dim, dtype in ((512, torch.float32), (512, torch.bfloat16), (8192, torch.float32)):
        label, size = f"{_name(dtype)}, d = {dim}", dtype.itemsize
        for form in ("scalar", "diagonal"):
            yield Variant(
                f"Gaussian center loss with coefficients, {form}, {label}",
                "_gaussian_center_loss_kernel",
                functools.partial(_gaussian_center_loss, dim, dtype, form == "diagonal", True),
                "16 features",
                _rows_of_d_by_16,
                nbytes=16 * (2 * size + (8 if form == "diagonal" else 0)),
            )
        for kernel, shown in (
            ("_diagonal_feature_gradient_kernel", "features"),
            ("_diagonal_class_center_gradient_kernel", "class centers, a row a class"),
        ):
            yield Variant(
                f"diagonal Gaussian, gradient of {shown}, {label}",
                kernel,
                functools.partial(_gaussian_center_loss, dim, dtype, True, True),
                "element",
                _rows_of_d,
                nbytes=3 * size + 4,
            )
        for form in ("vmf", "scalar", "diagonal"):
            density = "vmf" if form == "vmf" else "gaussian"
            yield Variant(
                f"pair likelihood, a partner a row, {form}, {label}",
                "_pair_likelihood_kernel",
                functools.partial(_pair_likelihood_loss, dim, dtype, density, form == "diagonal"),
                "row",
                _one,
                nbytes=dim * (size + 4 + (8 if form == "diagonal" else 0)),
            )


# ---- margin softmax


def _margin_softmax(dtype: torch.dtype, precision: str, skip_below: float) -> None:
    embeddings = torch.zeros(BATCH, 512, dtype=dtype)
    class_centers = torch.zeros(CLASSES, 512, dtype=dtype)
    labels, row = torch.zeros(BATCH, dtype=torch.int64), torch.zeros(BATCH)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for uniform in (False, True):
            kernels.margin_softmax_statistics(
                embeddings, class_centers, labels, with_cosine_sum=uniform, compute_dtype=dtype, backend="triton"
            )
            kernels.margin_softmax_gradients(
                embeddings,
                class_centers,
                labels,
                row,
                row,
                row,
                row if uniform else None,
                finish=lambda gradient: None,
                consume=lambda start, stop, gradient: None,
                compute_dtype=dtype,
                skip_below=skip_below,
                backend="triton",
            )
    finally:
        torch.set_float32_matmul_precision(before)


def _cosines(arguments: Arguments) -> float:
    return arguments["ROWS"] * arguments["CLASSES"]


def _cosines_of_tiles(arguments: Arguments) -> float:
    return TILES * _cosines(arguments)


def _multiplied(arguments: Arguments) -> float:
    return arguments["ROWS"] * arguments["COLUMNS"]


def _width(arguments: Arguments) -> float:
    return arguments["WIDTH"]


def _margin_softmax_variants() -> Iterator[Variant]:
    for dtype, precision in (
        (torch.bfloat16, "highest"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
    ):
        operands = _name(dtype) if dtype != torch.float32 else "tf32" if precision == "high" else "float32"
        call = functools.partial(_margin_softmax, dtype, precision)
        product = Product(operands, 2 * 512, 512, "STEP")
        for with_sum in (False, True):
            name = "margin statistics" + ", with the sum" * with_sum
            yield Variant(
                f"{name}, {operands}, d = 512",
                "statistics_kernel",
                functools.partial(call, 0.0),
                "cosine",
                _cosines_of_tiles,
                product=product,
                turns=TILES,
                settings=(("WITH_SUM", with_sum),),
            )
        for skip in (False, True):
            suffix = f"{', skipping' * skip}, {operands}, d = 512"
            yield Variant(
                f"gradient of cosines{suffix}",
                "cosine_gradient_kernel",
                functools.partial(call, float(skip)),
                "cosine",
                _cosines,
                product=product,
                settings=(("SKIP", skip), ("UNIFORM", False)),
            )
            for add, name in ((True, "embeddings"), (False, "class centers")):
                yield Variant(
                    f"gradient of {name} by product{suffix}",
                    "product_kernel",
                    functools.partial(call, float(skip)),
                    "output",
                    _multiplied,
                    product=Product(operands, 2 * BATCH, BATCH, "STEP"),  # as many rows, or classes, are summed
                    settings=(("SKIP", skip), ("ADD", add)),
                )
        if precision == "highest":
            yield Variant(
                f"unit rows, {operands}, d = 512",
                "unit_rows_kernel",
                functools.partial(call, 0.0),
                "element",
                _width,
                nbytes=2 * dtype.itemsize,
            )
            yield Variant(
                f"gradient through the norm, {operands}, d = 512",
                "through_norm_kernel",
                functools.partial(call, 0.0),
                "element",
                _width,
                nbytes=8 + dtype.itemsize,
            )


# ---- similarity and pooling


def _faces(count: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, dim, dtype=dtype), torch.ones(count, dtype=torch.promote_types(dtype, torch.float32))


def _matrix(dim: int, dtype: torch.dtype) -> None:
    kernels.vmf_similarity_matrix(*_faces(PROBES, dim, dtype), *_faces(GALLERY, dim, dtype), backend="triton")


def _top_k(dim: int, dtype: torch.dtype) -> None:
    kernels.vmf_similarity_top_k(*_faces(PROBES, dim, dtype), *_faces(GALLERY, dim, dtype), 16, backend="triton")


def _histogram(dim: int, dtype: torch.dtype, distinct: bool) -> None:
    mu, kappa = _faces(PROBES, dim, dtype)
    ids = torch.zeros(PROBES, dtype=torch.int64)
    kernels.vmf_similarity_histogram(mu, kappa, ids, mu, kappa, ids, -1.0, 1.0, distinct=distinct, backend="triton")


def _gaussians(count: int, dim: int, dtype: torch.dtype, diagonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    mu, log_variance = _faces(count, dim, dtype)
    return mu, log_variance[:, None].expand(-1, dim) if diagonal else log_variance


def _gaussian_matrix(dim: int, dtype: torch.dtype, diagonal: bool) -> None:
    sets = *_gaussians(PROBES, dim, dtype, diagonal), *_gaussians(GALLERY, dim, dtype, diagonal)
    kernels.mutual_likelihood_matrix(*sets, backend="triton")


def _gaussian_top_k(dim: int, dtype: torch.dtype, diagonal: bool) -> None:
    sets = *_gaussians(PROBES, dim, dtype, diagonal), *_gaussians(GALLERY, dim, dtype, diagonal)
    kernels.mutual_likelihood_top_k(*sets, 16, backend="triton")


def _gaussian_histogram(dim: int, dtype: torch.dtype, diagonal: bool) -> None:
    mu, log_variance = _gaussians(PROBES, dim, dtype, diagonal)
    ids = torch.zeros(PROBES, dtype=torch.int64)
    sets = mu, log_variance, ids, mu, log_variance, ids
    kernels.mutual_likelihood_histogram(*sets, -1.0, 1.0, distinct=True, backend="triton")


def _pairs(dim: int, dtype: torch.dtype) -> None:
    faces = _faces(PROBES, dim, dtype)
    kernels.vmf_similarity(*faces, *faces, backend="triton")


def _pool(dim: int, dtype: torch.dtype, weighted: bool) -> None:
    mu, kappa = _faces(PROBES, dim, dtype)
    kernels.pool_templates(
        mu, kappa if weighted else None, torch.zeros(PROBES, dtype=torch.int64), 100, backend="triton"
    )


def _gaussian_pairs(dim: int, dtype: torch.dtype, diagonal: bool) -> None:
    faces = _gaussians(PROBES, dim, dtype, diagonal)
    kernels.mutual_likelihood(*faces, *faces, backend="triton")


def _pool_gaussians(dim: int, dtype: torch.dtype, diagonal: bool) -> None:
    mu, precision = _gaussians(PROBES, dim, dtype, diagonal)
    kernels.pool_gaussian_templates(mu, precision, torch.zeros(PROBES, dtype=torch.int64), 100, backend="triton")


def _scores(arguments: Arguments) -> float:
    return arguments["BLOCK"] ** 2


def _scores_of_tiles(arguments: Arguments) -> float:
    return TILES * _scores(arguments)


def _elements_of_scores(arguments: Arguments) -> float:
    return _scores(arguments) * arguments["D"]


def _gaussian_variants() -> Iterator[Variant]:
    for name, kernel, call, tiles in (
        ("matrix", "matrix_kernel", _gaussian_matrix, 1),
        ("histogram", "histogram_kernel", _gaussian_histogram, 1),
        ("top-k", "top_k_kernel", _gaussian_top_k, TILES),
    ):
        yield Variant(
            f"all pairs of Gaussians, scalar, {name}, bfloat16, d = 512",
            kernel,
            functools.partial(call, 512, torch.bfloat16, False),
            "score",
            _scores_of_tiles if tiles > 1 else _scores,
            product=Product("bfloat16", 2 * 512, 512, "BLOCK_D"),
            turns=tiles,
        )
    # Top-k has the loops over dimensions within a third, and is not counted.
    for name, kernel, call in (
        ("matrix", "matrix_kernel", _gaussian_matrix),
        ("histogram", "histogram_kernel", _gaussian_histogram),
    ):
        yield Variant(
            f"all pairs of Gaussians, diagonal, {name}, float32, d = 512",
            kernel,
            functools.partial(call, 512, torch.float32, True),
            "element",
            _elements_of_scores,
            slots=6.0,
            turns=512 / SHORT_SUM,
            inner_turns=SHORT_SUM / FACTORS,
        )


def _similarity_variants() -> Iterator[Variant]:
    for dtype in (torch.bfloat16, torch.float32):
        single = dtype == torch.float32
        label = f"{_name(dtype)}, d = 512"
        # float32 is three products of halves.
        product = Product("bfloat16", (3 if single else 1) * 2 * 512, 512, "BLOCK_D")
        for name, kernel, call, tiles in (
            ("all pairs, matrix", "matrix_kernel", functools.partial(_matrix, 512, dtype), 1),
            ("all pairs, histogram", "histogram_kernel", functools.partial(_histogram, 512, dtype, True), 1),
            ("all pairs, top-k", "top_k_kernel", functools.partial(_top_k, 512, dtype), TILES),
        ):
            yield Variant(
                f"{name}, {label}",
                kernel,
                call,
                "score",
                _scores_of_tiles if tiles > 1 else _scores,
                product=product,
                turns=tiles,
            )
    yield from _gaussian_variants()
    for dim, dtype in ((512, torch.float32), (512, torch.bfloat16), (512, torch.float64), (8192, torch.float32)):
        yield Variant(
            f"pairs, {_name(dtype)}, d = {dim}",
            "_pair_kernel",
            functools.partial(_pairs, dim, dtype),
            "16 elements",
            _rows_of_d_by_16,
            nbytes=2 * 16 * dtype.itemsize,
        )
    for dim, dtype in ((512, torch.float32), (512, torch.bfloat16), (512, torch.float64), (8192, torch.float32)):
        for weighted in (True, False):
            yield Variant(
                f"pooling, {'kappa' if weighted else 'equal'} weights, {_name(dtype)}, d = {dim}",
                "_pool_kernel",
                functools.partial(_pool, dim, dtype, weighted),
                "element",
                _rows_of_d,
                nbytes=dtype.itemsize,
            )
    for diagonal in (False, True):
        yield Variant(
            f"pairs of Gaussians, {'diagonal' if diagonal else 'scalar'}, float32, d = 512",
            "_mutual_likelihood_kernel",
            functools.partial(_gaussian_pairs, 512, torch.float32, diagonal),
            "16 elements",
            _rows_of_d_by_16,
            nbytes=(4 if diagonal else 2) * 16 * 4,
        )
        yield Variant(
            f"pooling, {'diagonal' if diagonal else 'scalar'} precisions, float32, d = 512",
            "_pool_kernel",
            functools.partial(_pool_gaussians, 512, torch.float32, diagonal),
            "element",
            _rows_of_d,
            nbytes=8 if diagonal else 4,
        )


@functools.lru_cache(maxsize=1)
def variants() -> tuple[Variant, ...]:
    """Returns every kernel in every form that counts."""
    return (
        *_log_bessel_variants(),
        *_scf_loss_variants(),
        *_objective_variants(),
        *_margin_softmax_variants(),
        *_similarity_variants(),
    )
