"""Largest errors by dimension, ours and others', against 60-digit arithmetic: a table, a JSON file and a plot.

    python -m bench.accuracy [--device cpu] [--out bench/results/<device>]

Exact values are those of tests/kernels/reference.json (40 kappas from 1e-6 to 1e7 for each dimension). The float32
columns cover DENSE_COUNT further kappas, where the float64 kernel serves as exact: its own columns show how good it is.
Errors of log I_v and log C_d are relative to max(1, |exact|), those of A_d, 1 - A_d and A_d' to the exact value.

On a CPU these are the PyTorch path, on a GPU the Triton kernels as that GPU runs them. Tables of the kernels as
compiled, executed on the CPU in every mode of ``compiled_accuracy``, follow; status 1 if one of its bounds fails.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import torch
from mpmath import mp, mpf

from bench.baselines.published_normalizer import OFFSET, published_log_bessel_i
from bench.kernels import compiled_accuracy
from bench.kernels.compiled_accuracy import complement_of_mean_resultant_length
from bench.measuring.environment import DEVICE, RESULTS, ROOT, device_slug, environment
from bench.measuring.results import write_json
from bench.measuring.tables import text_table
from scf_fast.command import Parser, run
from scf_fast.kernels import inverse_mean_resultant_length, log_bessel_i, log_vmf_normalizer, mean_resultant_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE = ROOT / "tests" / "kernels" / "reference.json"
KAPPA_RANGE = (1e-6, 1e7)
DENSE_COUNT = 4000
PLOT_DIM = 512
GRADIENT_TOLERANCE = 0.01  # up to which the published gradient counts as right

Entry = dict[str, Any]  # of the reference: dim and kappa, and psi, A and A_prime as 60-digit strings


class Quantity(NamedTuple):
    """One function of kappa.

    Attributes:
        ours: our function of (kappa, dim).
        exact: the exact value from a reference entry.
        floor: the least |exact| that an error is taken relative to.
    """

    symbol: str
    ours: Callable[[torch.Tensor, int], torch.Tensor]
    exact: Callable[[Entry], mpf]
    floor: float


def derivative_of_mean_resultant_length(kappa: torch.Tensor, dim: int) -> torch.Tensor:
    kappa = kappa.detach().requires_grad_()
    return torch.autograd.grad(mean_resultant_length(kappa, dim).sum(), kappa)[0]


QUANTITIES = (
    Quantity(
        "log I_v",
        lambda kappa, dim: log_bessel_i(dim / 2 - 1, kappa),
        lambda entry: mpf(entry["psi"]) + (mpf(entry["dim"]) / 2 - 1) * mp.log(entry["kappa"]),
        1.0,
    ),
    Quantity(
        "log C_d",
        log_vmf_normalizer,
        lambda entry: -mpf(entry["psi"]) - mpf(entry["dim"]) / 2 * mp.log(2 * mp.pi),
        1.0,
    ),
    Quantity("A_d", mean_resultant_length, lambda entry: mpf(entry["A"]), 0.0),
    Quantity("A_d'", derivative_of_mean_resultant_length, lambda entry: mpf(entry["A_prime"]), 0.0),
    Quantity("1 - A_d", complement_of_mean_resultant_length, lambda entry: 1 - mpf(entry["A"]), 0.0),  # PyTorch's alone
)


class Exact(NamedTuple):
    """Exact values as an unevaluated sum of two float64 arrays, which keeps errors below 1e-16 visible in float64."""

    high: np.ndarray
    low: np.ndarray

    @classmethod
    def split(cls, values: Sequence[mpf]) -> "Exact":
        """Splits 60-digit values."""
        high = np.array([float(value) for value in values])
        return cls(high, np.array([float(value - mpf(head)) for value, head in zip(values, high.tolist())]))


def errors(values: Any, exact: Exact, floor: float = 0.0) -> np.ndarray:
    """Returns |values - exact| / max(floor, |exact|) as a float64 array; inf where a value is not finite."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        quotients = np.abs((values - exact.high) - exact.low) / np.maximum(floor, np.abs(exact.high))
    return np.where(np.isfinite(values), quotients, np.inf)


def load_reference() -> dict[int, list[Entry]]:
    """Loads reference.json as {dim: entries by rising kappa}."""
    entries = json.loads(REFERENCE.read_text())["entries"]
    return {
        dim: [entry for entry in entries if entry["dim"] == dim] for dim in sorted({entry["dim"] for entry in entries})
    }


def dense_kappas() -> np.ndarray:
    """Returns DENSE_COUNT values as float64, geometric over KAPPA_RANGE and representable in float32."""
    return np.geomspace(*KAPPA_RANGE, DENSE_COUNT).astype(np.float32).astype(np.float64)


def evaluate(
    function: Callable[[torch.Tensor, int], torch.Tensor],
    kappas: Sequence[float] | np.ndarray,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> np.ndarray:
    """Computes ``function(kappa, dim)`` in ``dtype`` on ``device`` and returns it as a float64 array."""
    return function(torch.tensor(kappas, dtype=dtype, device=device), dim).detach().double().cpu().numpy()


def our_errors(dim: int, entries: list[Entry], device: torch.device | str) -> dict[str, dict[str, float]]:
    """Returns the largest errors of our functions, {symbol: {"float32": error, "float64": error}}."""
    kappas, dense = np.array([entry["kappa"] for entry in entries]), dense_kappas()
    largest = {}
    for symbol, ours, exact_of, floor in QUANTITIES:
        with mp.workdps(60):
            exact = Exact.split([exact_of(entry) for entry in entries])
        by_dtype = {
            name: errors(evaluate(ours, kappas, dim, getattr(torch, name), device), exact, floor)
            for name in ("float32", "float64")
        }
        nearly_exact = evaluate(ours, dense, dim, torch.float64, device)
        on_dense = errors(
            evaluate(ours, dense, dim, torch.float32, device), Exact(nearly_exact, np.zeros_like(dense)), floor
        )
        by_dtype["float32"] = np.concatenate([by_dtype["float32"], on_dense])
        largest[symbol] = {name: float(values.max()) for name, values in by_dtype.items()}
    return largest


def published_value_and_gradient(kappas: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the published log I_v and its d/dkappa in float32 and returns both as float64 arrays."""
    kappa = torch.tensor(kappas, dtype=torch.float32, requires_grad=True)
    value = published_log_bessel_i(dim / 2 - 1, kappa)
    (gradient,) = torch.autograd.grad(value.sum(), kappa)
    return value.detach().double().numpy(), gradient.double().numpy()


def scipy_log_bessel_i(kappas: np.ndarray, order: float) -> tuple[np.ndarray, np.ndarray]:
    """Computes log I_v in float64 with both of SciPy's functions: (log ive_v(kappa) + kappa, log iv_v(kappa)).

    The first is infinite where ive underflows, the second where iv under- or overflows.
    """
    with np.errstate(divide="ignore"):
        return np.log(scipy.special.ive(order, kappas)) + kappas, np.log(scipy.special.iv(order, kappas))


def range_where(holds: np.ndarray, kappas: np.ndarray) -> list[float] | None:
    """Returns [first, last] of the unbroken run of kappas that ends with the highest one for which ``holds`` is true;
    None where it is true for none.
    """
    if not holds.any():
        return None
    last = int(np.flatnonzero(holds)[-1])
    failing_before = np.flatnonzero(~holds[:last])
    first = int(failing_before[-1]) + 1 if len(failing_before) else 0
    return [float(kappas[first]), float(kappas[last])]


def other_errors(dim: int, device: torch.device | str) -> dict[str, dict[str, Any]]:
    """Measures over dense_kappas() how accurate SciPy in float64 and the published formula in float32 are, and where
    they hold.
    """
    order, kappas = dim / 2 - 1, dense_kappas()
    zeros = np.zeros_like(kappas)
    log_i = Exact(evaluate(QUANTITIES[0].ours, kappas, dim, torch.float64, device), zeros)
    gradient = Exact(evaluate(mean_resultant_length, kappas, dim, torch.float64, device) + order / kappas, zeros)
    by_ive, by_iv = (errors(values, log_i, floor=1.0) for values in scipy_log_bessel_i(kappas, order))
    value, published_gradient = published_value_and_gradient(kappas, dim)
    return {
        "scipy log ive + kappa": {
            "largest": float(by_ive[np.isfinite(by_ive)].max()),
            "finite": range_where(np.isfinite(by_ive), kappas),
        },
        "scipy log iv": {
            "largest": float(by_iv[np.isfinite(by_iv)].max()),
            "finite": range_where(np.isfinite(by_iv), kappas),
        },
        "published": {
            "largest": float(errors(value, log_i, floor=1.0).max()),
            "gradient holds": range_where(errors(published_gradient, gradient) <= GRADIENT_TOLERANCE, kappas),
        },
    }


def published_optimal_kappa(order: float, cos: float) -> float:
    """Returns the kappa that minimizes the published loss at a cosine below 1: the root of its d/dkappa, in float64.

    -cos - v / (1e-6 + kappa) + d/dkappa (log(1e-6 + ive_v(kappa)) + kappa) = 0
    """

    def slope(kappa: float) -> float:
        scaled = scipy.special.ive(order, kappa)
        derivative = scipy.special.ive(order - 1, kappa) - scaled * (order + kappa) / kappa
        return -cos - order / (OFFSET + kappa) + 1 + derivative / (OFFSET + scaled)

    return scipy.optimize.brentq(slope, 1e-3 * order, 10 * order / (1 - cos))


def span(bounds: list[float] | None) -> str:
    """Describes bounds of kappa in words; an end of KAPPA_RANGE counts as no bound."""
    if bounds is None:
        return "nowhere"
    low, high = bounds
    words = ([f"from {low:.3g}"] if low > 1.01 * KAPPA_RANGE[0] else []) + (
        [f"to {high:.3g}"] if high < 0.99 * KAPPA_RANGE[1] else []
    )
    return " ".join(words) or "everywhere"


def report(ours: dict[int, dict[str, dict[str, float]]], others: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Returns the two tables as text."""
    columns = [
        (symbol, name) for name in ("float32", "float64") for symbol in (quantity.symbol for quantity in QUANTITIES)
    ]
    our_rows = [[str(dim), *(f"{ours[dim][symbol][name]:.1e}" for symbol, name in columns)] for dim in ours]
    other_rows = [
        [
            str(dim),
            f"{row['scipy log ive + kappa']['largest']:.1e}",
            span(row["scipy log ive + kappa"]["finite"]),
            f"{row['scipy log iv']['largest']:.1e}",
            span(row["scipy log iv"]["finite"]),
            f"{row['published']['largest']:.1e}",
            span(row["published"]["gradient holds"]),
        ]
        for dim, row in others.items()
    ]
    return "\n".join(
        [
            f"Ours, largest error over kappa = {KAPPA_RANGE[0]:g} .. {KAPPA_RANGE[1]:g}",
            text_table(["d", *(f"{symbol} f{name[-2:]}" for symbol, name in columns)], our_rows),
            "",
            "Others, log I_v: largest error where finite, and the kappa where they hold",
            text_table(
                [
                    "d",
                    "log ive + kappa f64",
                    "finite",
                    "log iv f64",
                    "finite",
                    "published f32",
                    f"gradient within {GRADIENT_TOLERANCE:.0%}",
                ],
                other_rows,
            ),
        ]
    )


_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def plot(path: Path, entries: list[Entry], others: dict[str, dict[str, Any]], device: torch.device | str) -> None:
    """Draws two panels at d = PLOT_DIM: the errors of log I_v over kappa, and the optimal kappa over the cosine.

    Args:
        entries: the reference at PLOT_DIM.
        others: ``other_errors`` at PLOT_DIM.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        _plot_errors(left, entries, others, device)
        _plot_optimal_kappa(right, entries, device)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _plot_errors(
    axes: "Axes", entries: list[Entry], others: dict[str, dict[str, Any]], device: torch.device | str
) -> None:
    kappas = np.array([entry["kappa"] for entry in entries])
    with mp.workdps(60):
        exact = Exact.split([QUANTITIES[0].exact(entry) for entry in entries])
    log_ive, log_iv = scipy_log_bessel_i(kappas, PLOT_DIM / 2 - 1)
    curves = {
        "published code, float32": (published_value_and_gradient(kappas, PLOT_DIM)[0], "#d62728", "o"),
        f"SciPy log iv, float64 (finite {span(others['scipy log iv']['finite'])})": (log_iv, "#ff9f1c", "s"),
        f"SciPy log ive + κ, float64 (finite {span(others['scipy log ive + kappa']['finite'])})": (
            log_ive,
            "#8c6bb1",
            "^",
        ),
        "scf_fast, float32": (evaluate(QUANTITIES[0].ours, kappas, PLOT_DIM, torch.float32, device), "#1f77b4", "o"),
        "scf_fast, float64": (evaluate(QUANTITIES[0].ours, kappas, PLOT_DIM, torch.float64, device), "#17a398", "o"),
    }
    for label, (values, color, marker) in curves.items():
        # Errors below the unit roundoff of float64 are drawn at it.
        relative = np.maximum(errors(values, exact, floor=1.0), 2.0**-53)
        drawn = np.isfinite(relative)
        axes.plot(
            kappas[drawn],
            relative[drawn],
            color=color,
            marker=marker,
            markersize=7 if "SciPy" in label else 3.5,
            fillstyle="none" if "SciPy" in label else "full",
            linewidth=1.3,
            label=label,
        )
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(3e-17, 1e2),
        xlabel="concentration κ",
        ylabel="error of log I$_v$(κ), relative to max(1, |log I$_v$|)",
        title=f"Error of the normalizer, d = {PLOT_DIM}",
    )
    axes.legend(loc="center left", bbox_to_anchor=(0.0, 0.66))


def _plot_optimal_kappa(axes: "Axes", entries: list[Entry], device: torch.device | str) -> None:
    order = PLOT_DIM / 2 - 1
    cosines = np.concatenate([np.linspace(0.005, 0.95, 190), np.linspace(0.955, 0.995, 41)])
    published = [published_optimal_kappa(order, cos) for cos in cosines]
    ours = evaluate(inverse_mean_resultant_length, cosines, PLOT_DIM, torch.float64, device)
    at_cosine = [(float(mpf(entry["A"])), entry["kappa"]) for entry in entries]
    shown = [(cos, kappa) for cos, kappa in at_cosine if cosines[0] < cos < cosines[-1]]
    axes.plot(cosines, published, color="#d62728", linewidth=1.8, label="published objective")
    axes.plot(cosines, ours, color="#1f77b4", linewidth=1.8, label="exact objective (scf_fast)")
    axes.plot(*zip(*shown), "o", color="black", markersize=4, label="60-digit arithmetic")
    axes.axhline(order, color="#d62728", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"the published κ never falls below d/2 - 1 = {order:g}",
        (0.99, order),
        xytext=(0, -12),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color="#d62728",
    )
    axes.set(
        yscale="log",
        xlim=(0, 1.01),
        xlabel="cos θ between feature and class center",
        ylabel="κ that minimizes the loss",
        title="Confidence that each objective asks for",
    )
    axes.legend(loc="upper left")


def measure(device: torch.device | str, out: Path) -> int:
    """Measures all errors, prints them, and writes the JSON file and the plot; returns 1 if a bound fails."""
    reference = load_reference()
    ours = {dim: our_errors(dim, entries, device) for dim, entries in reference.items()}
    others = {dim: other_errors(dim, device) for dim in reference}
    print(report(ours, others), flush=True)
    compiled = compiled_accuracy.measure()
    failed = compiled_accuracy.failures(compiled)
    print("", compiled_accuracy.report(compiled), *(failed or ["All bounds hold."]), sep="\n")
    path = out / f"accuracy-{device_slug(device)}.json"
    content = {"environment": environment(device), "kappa_range": KAPPA_RANGE, "ours": ours, "others": others}
    write_json(path, {**content, "compiled": compiled_accuracy.as_json(compiled), "failed": failed})
    plot(out / "accuracy.png", reference[PLOT_DIM], others[PLOT_DIM], device)
    print(f"\nWritten: {path}, {out / 'accuracy.png'}")
    return int(bool(failed))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=DEVICE, help="where our functions run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON file and the plot (default: bench/results/<device>)"
    )
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: measure(options.device, options.out or RESULTS / device_slug(options.device)))


if __name__ == "__main__":
    sys.exit(main())
