"""Largest errors of the Triton kernels as compiled, over what a GPU's inexact instructions may do: the second part of
``python -m bench.accuracy``.

The kernels are compiled for sm_80 and executed by ``bench.executor`` on the CPU, once for each mode: every inexact
instruction correctly rounded, at the upper end of its documented bound, at the lower end, and anywhere within. Exact
values are those of the float64 PyTorch path, which the first part compares with 60-digit arithmetic.

    family      log C, A, 1 - A, A', log I of float32 kappa; relative, log C and log I to at least 1
    SCF loss    relative to max(|loss|, kappa (1 - cos), 1); its slope in log kappa, to the larger of kappa (1 - cos)
                and kappa (1 - A); coefficients of the backward pass, each to its size, kappa cos to kappa; with the
                published normalizer, whose terms cancel, loss and slope relative to its largest term
    all pairs   at the neutral radius, cosines >= 0; relative to the larger kappa of the pair, and to at least
                max(2, d / 64): below, what terms of the size of 1 and of d round off remains
    Gaussians   mutual likelihood of all pairs; relative to the largest of the score, 1 / v (its mean over the
                dimensions) and d
"""

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bench.executor.approximation import Approximation, Mode, TensorCores
from bench.executor.launcher import ExecutedKernel, Executor, executing
from bench.measuring.tables import text_table
from scf_fast.kernels import log_bessel_i, mutual_likelihood_matrix
from scf_fast.kernels._debye_series import debye_plan
from scf_fast.kernels._loss_arguments import LossOption
from scf_fast.kernels.debye import debye_kernel, debye_torch
from scf_fast.kernels.log_bessel import Function, _log_bessel
from scf_fast.kernels.scf_loss import _loss_constant, _scf_loss
from scf_fast.kernels.vmf_similarity import neutral_radius
from scf_fast.kernels.vmf_similarity_tiles import vmf_similarity_matrix

ARCHITECTURE = 80
DIMS = (2, 3, 8, 16, 30, 32, 64, 128, 512, 2048, 8192)
COUNT = 4000  # values of kappa
RADIUS = 64.0
LOSS_ELEMENTS = 1 << 18  # of all rows of features; at most COUNT rows, at least 64
PAIR_DIMS = (2, 32, 128, 512)
PAIR_ROWS = 48  # of each of the two sets
PAIR_KAPPAS = (1e-2, 1e5)
GAUSSIAN_DIMS = PAIR_DIMS
GAUSSIAN_ROWS = 16  # of each of the two sets
_BLOCK = 512
_INPUTS = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Table(enum.Enum):
    """What one table shows."""

    FAMILY = "Triton, compiled for sm_80, worst over exact / plus / minus / random"
    LOSS = "SCF loss, Triton, compiled, worst over the modes, by type of features and class centers"
    PUBLISHED = "SCF loss with the published normalizer, Triton, compiled, likewise"
    TORCH = "SCF loss, PyTorch, by normalizer"
    PAIRS = "All pairs, Triton, compiled, worst over the modes, by type of directions and tensor cores"
    GAUSSIANS = "Mutual likelihood of all pairs, Triton, compiled, worst over the modes"


class Error(NamedTuple):
    """The largest error in one cell of a table.

    Attributes:
        mode: of the inexact instructions, or "" for PyTorch.
        kappa: where it is; of pairs, the larger one.
    """

    table: Table
    column: str
    dim: int
    error: float
    mode: str
    kappa: float


class Bound(NamedTuple):
    """What the errors of the columns that start with ``column`` must not exceed, from dimension ``from_dim``."""

    table: Table
    column: str
    at_most: float
    from_dim: int = 2

    def covers(self, error: Error) -> bool:
        return error.table is self.table and error.column.startswith(self.column) and error.dim >= self.from_dim


BOUNDS = (
    Bound(Table.FAMILY, "log C_d", 4e-7),
    Bound(Table.FAMILY, "A_d f32", 3e-7),
    Bound(Table.FAMILY, "A_d' f32", 3e-7, from_dim=64),
    Bound(Table.LOSS, "loss", 1e-6),
    Bound(Table.LOSS, "slope", 1e-6),
    Bound(Table.LOSS, "coefficients", 5e-7),
    Bound(Table.PAIRS, "", 3e-7),
    Bound(Table.GAUSSIANS, "", 6e-7),
)


def largest(table: Table, column: str, dim: int, mode: str, errors: torch.Tensor, kappa: torch.Tensor) -> Error:
    """Returns the largest of errors (of kappa's shape); infinite where one is NaN."""
    errors = errors.nan_to_num(nan=torch.inf)
    at = errors.argmax()
    return Error(table, column, dim, errors.flatten()[at].item(), mode, kappa.flatten()[at].item())


def worst(errors: Iterable[Error]) -> list[Error]:
    """Returns the largest of the errors of each cell, in the order in which the cells first came."""
    cells: dict[tuple[Table, str, int], Error] = {}
    for error in errors:
        cell = error.table, error.column, error.dim
        if cell not in cells or error.error > cells[cell].error:
            cells[cell] = error
    return list(cells.values())


# ---- log-Bessel family


@triton.jit
def _complement_kernel(
    kappa_ptr,  # (count,)
    complement_ptr,  # (count,) out: 1 - A
    count,
    PLAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of elements. No public function returns 1 - A, which the SCF loss takes its slope from."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    _, _, _, complement, _, _ = debye_kernel(tl.load(kappa_ptr + at, mask=mask, other=1.0), PLAN, 1, 1)
    tl.store(complement_ptr + at, complement, mask=mask)


def complement_of_mean_resultant_length(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns 1 - A_d as PyTorch evaluates it for the SCF loss, in kappa's dtype."""
    plan = debye_plan(dim / 2 - 1, kappa.dtype, compensated=kappa.dtype == torch.float64)
    return debye_torch(kappa.double(), plan, lowest=1).complement.to(kappa.dtype)


def family_kappas(dim: int, count: int) -> torch.Tensor:
    """Returns ``count`` float32 values: 0, three quarters over 1e-6 .. 1e7, and the neighborhood of the order."""
    near = count // 4
    return torch.cat(
        [torch.zeros(1), torch.logspace(-6, 7, count - near - 1), torch.linspace(0.25, 4 * (dim / 2 - 1) + 4, near)]
    )


def _family(kappa: torch.Tensor, dim: int, triton_kernel: bool) -> dict[str, torch.Tensor]:
    """Returns log C, A, A' and log I; the last is -inf at kappa = 0."""
    order = dim / 2 - 1
    log_c, _ = _log_bessel(kappa, order, Function.LOG_VMF_NORMALIZER.value, 0, triton_kernel, False)
    ratio, slope = _log_bessel(kappa, order, Function.PSI.value, 1, triton_kernel, False)
    log_i = log_bessel_i(order, kappa, backend="triton" if triton_kernel else "torch")
    return {"log I_v f32": log_i, "log C_d f32": log_c, "A_d f32": ratio, "A_d' f32": slope}


def family_errors(dim: int, count: int) -> Iterator[Error]:
    """Measures the functions of kappa."""
    kappa = family_kappas(dim, count)
    exact = _family(kappa.double(), dim, triton_kernel=False)
    exact["1 - A_d f32"] = complement_of_mean_resultant_length(kappa.double(), dim)
    for mode in Mode:
        approximation = Approximation(mode)
        with executing(ARCHITECTURE, approximation):
            results = _family(kappa, dim, triton_kernel=True)
        results["1 - A_d f32"] = torch.empty_like(kappa)
        ExecutedKernel(_complement_kernel, Executor(ARCHITECTURE, approximation))[(triton.cdiv(count, _BLOCK),)](
            kappa,
            results["1 - A_d f32"],
            count,
            PLAN=debye_plan(dim / 2 - 1, torch.float32),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        for column, value in exact.items():
            floor = 1.0 if column.startswith("log") else torch.finfo(torch.float32).tiny
            difference = (results[column].double() - value).abs()
            # -inf and 0, which both have at kappa = 0
            difference = difference.masked_fill(results[column].double() == value, 0.0)
            size = value.abs().clamp(min=floor)
            yield largest(Table.FAMILY, column, dim, mode.value, difference / size, kappa)


# ---- SCF loss


class Batch(NamedTuple):
    """Arguments of the SCF loss, but for the radius."""

    features: torch.Tensor
    log_kappa: torch.Tensor
    class_centers: torch.Tensor
    labels: torch.Tensor

    def double(self) -> "Batch":
        return Batch(self.features.double(), self.log_kappa.double(), self.class_centers.double(), self.labels)


def batch_of(dim: int, count: int, dtype: torch.dtype) -> Batch:
    """Returns rows with angles from 0 to about 70 degrees, of all lengths, and kappa from 1e-6 to 1e7."""
    generator = torch.Generator().manual_seed(0)
    rows = max(64, min(count, LOSS_ELEMENTS // dim))
    centers = torch.randn(50, dim, generator=generator)
    labels = torch.randint(50, (rows,), generator=generator)
    noise = torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    features = torch.nn.functional.normalize(centers[labels], dim=1)
    features = features + 3 * torch.rand(rows, 1, generator=generator) ** 2 * noise
    features = features * torch.randn(rows, 1, generator=generator).exp()
    log_kappa = torch.empty(rows).uniform_(-13.8, 16.1, generator=generator)
    return Batch(features.to(dtype), log_kappa, centers.to(dtype), labels)


def _loss(batch: Batch, options: LossOption) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _scf_loss(*batch, RADIUS, int(options | LossOption.COEFFICIENTS | LossOption.TERMS))


def loss_errors(dim: int, count: int) -> Iterator[Error]:
    """Measures the SCF loss, its slope and the coefficients of its backward pass."""
    for normalizer, options in (("exact", LossOption(0)), ("published", LossOption.PUBLISHED)):
        table = Table.PUBLISHED if options else Table.LOSS
        for name, dtype in _INPUTS.items():
            batch = batch_of(dim, count, dtype)
            exact = _loss(batch.double(), options)
            sizes = _sizes(exact, dim, bool(options))
            for mode in Mode:
                with executing(ARCHITECTURE, Approximation(mode)):
                    results = _loss(batch, options | LossOption.TRITON)
                for quantity, error in _parts(results, exact, sizes).items():
                    yield largest(table, f"{quantity} {name}", dim, mode.value, error, exact[2][2])
            if dtype == torch.float32:
                for quantity, error in _parts(_loss(batch, options), exact, sizes).items():
                    yield largest(Table.TORCH, f"{quantity} {normalizer}", dim, "", error, exact[2][2])


class Sizes(NamedTuple):
    """What errors of a row are taken relative to."""

    loss: torch.Tensor
    slope: torch.Tensor
    coefficients: torch.Tensor  # (4, B)


def _sizes(exact: Sequence[torch.Tensor], dim: int, published: bool) -> Sizes:
    """Returns the largest terms of exact results. The published formula has larger ones, which cancel."""
    loss, slope, coefficients, terms = exact
    kappa, one_minus_cos = coefficients[2], 1 - terms[0]
    loss_size = torch.maximum(loss.abs(), kappa * one_minus_cos).clamp(min=1)
    slope_size = torch.maximum(kappa * one_minus_cos, (kappa * one_minus_cos - slope).abs())
    if published:
        loss_size = torch.maximum(loss_size, terms[3].abs()).clamp(min=_loss_constant(dim, RADIUS))
        slope_size = slope_size.clamp(min=dim / 2 - 1)
    return Sizes(loss_size, slope_size, torch.stack([coefficients[0], coefficients[1], kappa, kappa]))


def _parts(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], sizes: Sizes) -> dict[str, torch.Tensor]:
    """Returns the error of each row, by quantity."""
    names = "loss", "slope", "coefficients"
    errors = [(result - value).abs() / size for result, value, size in zip(results, exact, sizes)]
    return dict(zip(names, [*errors[:2], errors[2].amax(dim=0)]))


# ---- all pairs


class Faces(NamedTuple):
    mu: torch.Tensor
    kappa: torch.Tensor


def faces_of(dim: int, dtype: torch.dtype) -> tuple[Faces, Faces]:
    """Returns two sets of PAIR_ROWS faces of 8 people; cosines within a person go from about 0.5 to 1."""
    generator = torch.Generator().manual_seed(0)
    people = torch.nn.functional.normalize(torch.randn(8, dim, generator=generator), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(2, PAIR_ROWS, dim, generator=generator), dim=2)
    mix = torch.rand(2, PAIR_ROWS, 1, generator=generator)
    low, high = torch.tensor(PAIR_KAPPAS).log()
    kappas = torch.exp(low + (high - low) * torch.rand(2, PAIR_ROWS, generator=generator))
    mu = (people[torch.arange(PAIR_ROWS) % 8] + mix * noise).to(dtype)
    return Faces(mu[0], kappas[0]), Faces(mu[1], kappas[1])


def pair_errors(dim: int) -> Iterator[Error]:
    """Measures the similarity of all pairs whose directions do not oppose each other."""
    for name, dtype in _INPUTS.items():
        first, second = faces_of(dim, dtype)
        mu1, kappa1, mu2, kappa2 = (x.double() for x in (*first, *second))
        radius = neutral_radius(dim)  # the constant of another would be rounded into the scores
        exact = vmf_similarity_matrix(mu1, kappa1, mu2, kappa2, radius, backend="torch")
        cos = torch.nn.functional.normalize(mu1, dim=1) @ torch.nn.functional.normalize(mu2, dim=1).T
        larger = torch.maximum(kappa1[:, None], kappa2)
        size = larger.clamp(min=max(2.0, dim / 64))
        for cores in (TensorCores.EXACT, TensorCores.A100, TensorCores.H100):
            for mode in Mode:
                with executing(ARCHITECTURE, Approximation(mode, cores)):
                    scores = vmf_similarity_matrix(
                        first.mu, first.kappa, second.mu, second.kappa, radius, backend="triton"
                    )
                error = torch.where(cos >= 0, (scores - exact).abs() / size, 0.0)
                yield largest(Table.PAIRS, f"{name} {cores.value}", dim, mode.value, error, larger)


def gaussian_errors(dim: int) -> Iterator[Error]:
    """Measures the mutual likelihood of the same faces, with kappa as precision, and precisions around it."""
    generator = torch.Generator().manual_seed(1)
    sets = [(face.mu[:GAUSSIAN_ROWS], -face.kappa[:GAUSSIAN_ROWS].log()) for face in faces_of(dim, torch.float32)]
    several = [(mu, x[:, None] + torch.randn(GAUSSIAN_ROWS, dim, generator=generator)) for mu, x in sets]
    for name, cores, (first, second) in (
        ("scalar", TensorCores.A100, sets),
        ("scalar", TensorCores.H100, sets),
        ("diagonal", TensorCores.EXACT, several),  # needs none
    ):
        exact = mutual_likelihood_matrix(*(x.double() for x in (*first, *second)), backend="torch")
        precision = torch.exp(-torch.logaddexp(first[1].double()[:, None], second[1].double()))
        precision = precision.view(GAUSSIAN_ROWS, GAUSSIAN_ROWS, -1).mean(dim=2)
        size = torch.maximum(exact.abs(), precision).clamp(min=dim)
        for mode in Mode:
            with executing(ARCHITECTURE, Approximation(mode, cores)):
                scores = mutual_likelihood_matrix(*first, *second, backend="triton")
            error = (scores - exact).abs() / size
            yield largest(Table.GAUSSIANS, f"{name} {cores.value}", dim, mode.value, error, precision)


# ---- the report


def measure() -> list[Error]:
    """Returns the largest error of every cell."""
    errors = [error for dim in DIMS for error in (*family_errors(dim, COUNT), *loss_errors(dim, COUNT))]
    errors += [error for dim in PAIR_DIMS for error in pair_errors(dim)]
    errors += [error for dim in GAUSSIAN_DIMS for error in gaussian_errors(dim)]
    return worst(errors)


def report(errors: Sequence[Error]) -> str:
    """Returns the tables as text."""
    parts = []
    for table in Table:
        cells = {(error.column, error.dim): error for error in errors if error.table is table}
        columns = list(dict.fromkeys(column for column, _ in cells))
        rows = [
            [str(dim), *(f"{cells[column, dim].error:.1e}" for column in columns)]
            for dim in dict.fromkeys(dim for _, dim in cells)
        ]
        parts += [f"{table.value}", text_table(["d", *columns], rows), ""]
    return "\n".join(parts)


def as_json(errors: Sequence[Error]) -> list[dict[str, Any]]:
    """Returns the errors for a JSON file."""
    return [{**error._asdict(), "table": error.table.name.lower()} for error in errors]


def failures(errors: Sequence[Error]) -> list[str]:
    """Returns a line for each error beyond its bound."""
    return [
        f"FAILED: {error.column} at d = {error.dim} is {error.error:.2e} (kappa = {error.kappa:.3g}, {error.mode}), "
        f"bound {bound.at_most:g}: {bound.table.value}"
        for bound in BOUNDS
        for error in errors
        if bound.covers(error) and not error.error <= bound.at_most
    ]
