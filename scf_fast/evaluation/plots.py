"""Figures of the evaluation report, as PNG."""

import io
import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipelines.sources import ImageSource
from scf_fast.evaluation.metrics import tar_at_far
from scf_fast.evaluation.protocols import Rejection

_BLUE, _ORANGE, _GREY, _GREEN = "#2f6db3", "#e07b28", "#8a8f98", "#3d9a63"
_REJECTION_STYLES = {  # by rejection order: label and line
    "kappa": ("κ", {"color": _ORANGE, "lw": 2.2}),
    "feature_norm": ("feature norm", {"color": _BLUE, "lw": 1.6}),
    "random": ("random", {"color": _GREY, "lw": 1.6}),
    "oracle": ("oracle", {"color": _GREEN, "lw": 1.2, "ls": ":"}),
}


def _figure(title: str, xlabel: str, ylabel: str, width: float = 6.4, height: float = 4.4):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#e4e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)


def plot_roc(path: Path, title: str, curves: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]) -> None:
    """TAR over FAR on a logarithmic axis, from where ten impostor pairs pass.

    Args:
        curves: by (what is compared, by which score), scores (P,) and same (P,) bool; a colour for the first, a line style for the second.
    """
    figure, axes = _figure(title, "false accept rate", "true accept rate")
    colors = dict(zip(dict.fromkeys(what for what, _ in curves), itertools.cycle((_BLUE, _ORANGE, _GREEN, _GREY))))
    lines = dict(zip(dict.fromkeys(score for _, score in curves), itertools.cycle(("-", "--"))))
    for (what, score), (scores, same) in curves.items():
        fars = np.geomspace(min(1, 10 / np.count_nonzero(~same)), 1, 400)
        tars = list(tar_at_far(scores, same, fars.tolist()).values())
        axes.plot(fars, tars, label=f"{what}, {score}", color=colors[what], ls=lines[score], lw=1.8)
    axes.set(xscale="log", ylim=(None, 1.01))
    axes.legend(loc="lower right", frameon=False)
    _save(figure, path)


def plot_rejection(path: Path, rejection: Rejection) -> None:
    """Error rate of the pairs kept over the fraction rejected, for every order, down to twenty pairs; the areas are of whole curves."""
    figure, axes = _figure("Error versus reject", "pairs rejected [%]", "error rate of the pairs kept [%]")
    for order, curve in rejection.curves.items():
        label, style = _REJECTION_STYLES[order]
        shown = slice(max(1, len(curve.error) - 19))
        axes.plot(100 * curve.rejected[shown], 100 * curve.error[shown], label=f"{label} (area {curve.area:.4f})", **style)
    axes.set(xlim=(0, 100), ylim=(0, 100 * 1.3 * rejection.curves["oracle"].error_at(0) + 0.1))
    axes.legend(frameon=False, title=f"accepted above cosine {rejection.threshold:.3f}", title_fontsize=9, alignment="left")
    _save(figure, path)


def plot_severity(path: Path, kappa: np.ndarray, severity: np.ndarray, correlation: float | None) -> None:
    """Kappa of each image over its known degradation severity, with the median and the middle 80 % of twenty equal groups."""
    figure, axes = _figure("κ against degradation" if correlation is None else f"κ against degradation (Spearman {correlation:.3f})",
                           "known severity", "κ")
    axes.scatter(severity, kappa, s=5, alpha=0.25, color=_BLUE, lw=0, rasterized=True)
    groups = np.array_split(np.argsort(severity, kind="stable"), min(20, len(severity)))
    centre = [np.median(severity[group]) for group in groups]
    low, middle, high = np.transpose([np.quantile(kappa[group], (0.1, 0.5, 0.9)) for group in groups])
    axes.fill_between(centre, low, high, color=_ORANGE, alpha=0.2, lw=0, label="10–90 %")
    axes.plot(centre, middle, color=_ORANGE, lw=2.2, label="median")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_kappa_histogram(path: Path, kappa: np.ndarray, same: np.ndarray) -> None:
    """Distribution of each pair's lower kappa, (P,), among genuine and impostor pairs."""
    figure, axes = _figure("Lower κ of a pair", "κ", "pairs")
    positive = kappa[kappa > 0]  # a logarithmic axis has no place for 0
    bins = np.geomspace(positive.min(), positive.max() * (1 + 1e-9), 41) if len(positive) else 1
    for label, part, color in ("genuine", same, _BLUE), ("impostor", ~same, _ORANGE):
        axes.hist(kappa[part], bins=bins, histtype="stepfilled", alpha=0.35, color=color, label=label)
        axes.hist(kappa[part], bins=bins, histtype="step", color=color, lw=1.4)
    axes.set_xscale("log")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_faces(path: Path, source: ImageSource, kappa: np.ndarray, severity: np.ndarray | None, columns: int = 10, rows: int = 2) -> None:
    """Faces at evenly spaced ranks of kappa, from the lowest to the highest, with kappa (and the known severity) under each."""
    order = np.argsort(kappa, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, columns * rows).round().astype(int))]
    figure = Figure(figsize=(1.15 * columns, 1.6 * rows + 0.4), layout="constrained")
    figure.suptitle("Faces by κ, lowest to highest", fontsize=12, fontweight="bold", x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, chosen):
        axes.imshow(Image.open(io.BytesIO(source.encoded(int(i)).tobytes())).convert("RGB"))
        known = "" if severity is None else f"\nseverity {severity[i]:.2f}"
        axes.text(0.5, -0.04, f"κ {kappa[i]:.3g}{known}", transform=axes.transAxes, ha="center", va="top", fontsize=8)
    _save(figure, path)
