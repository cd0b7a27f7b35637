"""The confidence that each objective of stage 2 asks for at a given cosine: a table and the plot of docs/objectives.md.

    python -m bench.objectives [--dim 512] [--out docs/objectives-kappa.png]

An objective asks for the kappa, or the precision 1 / variance, that minimizes its loss: of one image at a cosine with
its class center, or of two images with one kappa between them at a cosine with each other. Everything is computed from
formulas in float64; nothing is trained.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.kernels.accuracy import published_optimal_kappa
from bench.measuring.environment import ROOT
from bench.measuring.tables import markdown_table
from scf_fast.command import Parser, run
from scf_fast.errors import InputError
from scf_fast.kernels import inverse_mean_resultant_length, mean_resultant_length
from scf_fast.objectives import Objective

TABLE_COSINES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
_PLOT_COSINES = np.linspace(0.01, 0.99, 197)
_COLORS = {
    Objective.SCF: "#1f77b4",
    Objective.SCF_GAUSSIAN: "#17a398",
    Objective.PFE: "#8c6bb1",
    Objective.PFE_VMF: "#ff9f1c",
}
_PUBLISHED = "SCF as published code"
_PUBLISHED_COLOR = "#d62728"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _best_kappa_of_pair(cos: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the kappa of two images that maximizes Eqn (13), psi(kappa s) - 2 psi(kappa) with s = sqrt(2 + 2 cos):
    the root of s A_d(kappa s) - 2 A_d(kappa), by bisection in log kappa.
    """
    s = (2 + 2 * cos).sqrt()
    # Below, A_d(kappa) ~ kappa / d makes the slope positive; above, A_d(kappa) ~ 1 makes it negative.
    low, high = torch.full_like(cos, math.log(1e-3)), torch.log(10 * dim / (1 - cos))
    for _ in range(60):  # to rounding
        middle = (low + high) / 2
        kappa = middle.exp()
        rises = s * mean_resultant_length(kappa * s, dim) > 2 * mean_resultant_length(kappa, dim)
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return middle.exp()


def best_confidence(objective: Objective, cosines: npt.ArrayLike, dim: int) -> np.ndarray:
    """Returns the kappa, or the precision 1 / variance, at which an objective's loss is least.

    Args:
        cosines: (N,), of an image with its class center or, for PFE, with the other image of the pair, whose confidence
            is the same; in (0, 1).
        dim: d.
    Returns:
        (N,) float64.
    """
    cos = torch.from_numpy(np.array(cosines, dtype=np.float64, ndmin=1))
    if objective is Objective.SCF:
        return inverse_mean_resultant_length(cos, dim).numpy()
    if objective is Objective.PFE_VMF:
        return _best_kappa_of_pair(cos, dim).numpy()
    return ((dim if objective.is_pairwise else dim / 2) / (1 - cos)).numpy()


def make_table(dim: int) -> str:
    """Returns the best confidences at TABLE_COSINES as Markdown, a row for each objective."""
    rows = [
        [objective.title, *(f"{value:.1f}" for value in best_confidence(objective, TABLE_COSINES, dim))]
        for objective in Objective
    ]
    published = [f"{published_optimal_kappa(dim / 2 - 1, cos):.1f}" for cos in TABLE_COSINES]
    return markdown_table(["cosine", *map(str, TABLE_COSINES)], [rows[0], [_PUBLISHED, *published], *rows[1:]])


def plot(path: Path, dim: int) -> None:
    """Draws two panels: objectives against the class center, and objectives against the other image of a pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cosines = _PLOT_COSINES
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
        for axes, is_pairwise in zip(panels, (False, True)):
            for objective in Objective:
                if objective.is_pairwise is is_pairwise:
                    values = best_confidence(objective, cosines, dim)
                    axes.plot(cosines, values, color=_COLORS[objective], linewidth=1.8, label=objective.title)
        published = [published_optimal_kappa(dim / 2 - 1, cos) for cos in cosines]
        panels[0].plot(cosines, published, color=_PUBLISHED_COLOR, linewidth=1.8, linestyle="--", label=_PUBLISHED)
        consistent = best_confidence(Objective.SCF, np.sqrt(cosines), dim)
        label = "SCF at a cosine of √c with the class center"
        panels[1].plot(cosines, consistent, color=_COLORS[Objective.SCF], linewidth=1.2, linestyle=":", label=label)
        panels[0].set(title=f"One image, d = {dim}", xlabel="cosine with the class center", ylabel="best κ or 1 / σ²")
        panels[1].set(title="Two images, equal confidence", xlabel="cosine c of the two images")
        for axes in panels:
            axes.set(yscale="log", xlim=(0, 1))
            axes.legend(loc="upper left")
        figure.savefig(path, dpi=100, metadata={"Software": None})
        plt.close(figure)


def write(dim: int, out: Path) -> None:
    """Prints the table and writes the plot.

    Raises:
        InputError: the dimension is below 4, where the published code's objective has no best kappa above zero.
    """
    if dim < 4:
        raise InputError(f"--dim must be at least 4, got {dim}")
    print(make_table(dim))
    plot(out, dim)
    print(f"\nWritten: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.objectives", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=512, help="embedding width d (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs" / "objectives-kappa.png",
        help="the plot (default: docs/objectives-kappa.png)",
    )
    options = parser.parse_args(arguments)
    return run(parser.prog, lambda: write(options.dim, options.out))


if __name__ == "__main__":
    sys.exit(main())
