"""Figures of the evaluation report, as PNG in memory."""

import io
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from scf_fast.evaluation.metrics import FEW_IMPOSTORS, tar_at_far
from scf_fast.evaluation.quality import Rejection
from scf_fast.evaluation.results import DENSITY_MEASURES, Quality, Score, ScoreHistogram
from scf_fast.held_out import Reliability
from scf_fast.inference import Embeddings
from scf_fast.pipelines.loading.decode import load_face
from scf_fast.pipelines.sources.base import ImageSource
from scf_fast.pipelines.text import as_plot_text

if TYPE_CHECKING:  # imported where a figure is drawn: it takes half a second, and most ranks draw none
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY, _GREEN, _PURPLE, _RED = "#2f6db3", "#e07b28", "#8a8f98", "#3d9a63", "#7c5cbf", "#c23b4e"
Style = dict[str, Any]  # keyword arguments of Axes.plot
_REJECTION_STYLES: dict[Quality, Style] = {
    Quality.KAPPA: {"color": _ORANGE, "lw": 2.2},
    Quality.PRECISION: {"color": _ORANGE, "lw": 2.2},
    Quality.FEATURE_NORM: {"color": _BLUE, "lw": 1.6},
    Quality.DETECTOR: {"color": _PURPLE, "lw": 1.6},
    Quality.RANDOM: {"color": _GREY, "lw": 1.6},
    Quality.ORACLE: {"color": _GREEN, "lw": 1.2, "ls": ":"},
}
Curves = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]  # by (what is compared, by which score): FAR, TAR


class Confidence(NamedTuple):
    """Confidences of images or pairs, with the measure that they are of."""

    values: np.ndarray  # (N,) float64
    quality: Quality

    @classmethod
    def of(cls, embeddings: Embeddings) -> "Confidence | None":
        """Returns those of images; None without any."""
        values = embeddings.confidence
        return None if values is None else cls(values, DENSITY_MEASURES[embeddings.density].quality)

    @property
    def label(self) -> str:
        """Name in figures."""
        return self.quality.label


def _new_figure(**options: Any) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(**options)


def _figure(title: str, xlabel: str, ylabel: str, width: float = 6.4, height: float = 4.4) -> "tuple[Figure, Axes]":
    figure = _new_figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(as_plot_text(title), fontsize=12, fontweight="bold", loc="left")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#e4e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: "Figure") -> bytes:
    """Renders a figure: nearly all of the time that plotting takes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def roc_points(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns 400 points (FAR, TAR), as many as a curve can show, evenly spaced on a logarithmic axis from where ten
    impostor pairs pass; with fewer than FEW_IMPOSTORS, from where none does.
    """
    impostors = np.count_nonzero(~same)
    fars = np.geomspace((0.5 if impostors < FEW_IMPOSTORS else 10) / impostors, 1, 400)
    tars = tar_at_far(scores, same, fars.tolist())
    return fars, np.array([tars[far] for far in fars.tolist()])


def _styles(curves: Curves) -> dict[tuple[str, str], Style]:
    """Chooses a color for what is compared and a line style for the score."""
    colors = dict(
        zip(dict.fromkeys(what for what, _ in curves), itertools.cycle((_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY, _RED)))
    )
    lines = dict(zip(dict.fromkeys(score for _, score in curves), itertools.cycle(("-", "--"))))
    return {
        (what, score): {"label": as_plot_text(f"{what}, {score}"), "color": colors[what], "ls": lines[score], "lw": 1.8}
        for what, score in curves
    }


def plot_roc(title: str, curves: Curves) -> bytes:
    """Plots TAR over FAR."""
    figure, axes = _figure(title, "false accept rate", "true accept rate")
    for key, style in _styles(curves).items():
        axes.plot(*curves[key], **style)
    axes.set(xscale="log", ylim=(None, 1.01))
    axes.legend(loc="lower right", frameon=False)
    return _png(figure)


def plot_det(title: str, curves: Curves) -> bytes:
    """Plots the detection error trade-off: false reject rate over false accept rate, both logarithmic."""
    figure, axes = _figure(title, "false accept rate", "false reject rate")
    for key, style in _styles(curves).items():
        fars, tars = curves[key]
        shown = tars < 1  # a logarithmic axis has no place for 0
        axes.plot(fars[shown], 1 - tars[shown], **style)
    lowest = min((1 - tars[tars < 1]).min(initial=0.1) for _, tars in curves.values())
    axes.set(xscale="log", yscale="log", ylim=(lowest / 1.5, 1))
    axes.legend(loc="upper right", frameon=False)
    return _png(figure)


def plot_rejection(rejection: Rejection, score: str) -> bytes:
    """Plots the error rate of the pairs kept over the fraction rejected, for every order, down to fifty pairs; the
    areas are those of whole curves.
    """
    figure, axes = _figure("Error versus reject", "pairs rejected [%]", "error rate of the pairs kept [%]")
    for order, curve in rejection.curves.items():
        label = f"{order.label} (area {curve.area:.4f})"
        shown = np.unique(np.linspace(0, max(0, len(curve.error) - 50), 2000).astype(int))
        axes.plot(100 * curve.rejected[shown], 100 * curve.error[shown], label=label, **_REJECTION_STYLES[order])
    axes.set(xlim=(0, 100), ylim=(0, 100 * 1.3 * rejection.curves[Quality.ORACLE].error_at(0) + 0.1))
    axes.legend(
        frameon=False, title=f"accepted above {score} {rejection.threshold:.3f}", title_fontsize=9, alignment="left"
    )
    return _png(figure)


def plot_severity(confidence: Confidence, severity: np.ndarray, correlation: float | None) -> bytes:
    """Plots the confidence of each image over its known degradation severity, with the median and the middle 80 % of
    twenty equal groups.
    """
    title = f"{confidence.label} against degradation"
    if correlation is not None:
        title += f" (Spearman {correlation:.3f})"
    figure, axes = _figure(title, "known severity", confidence.label)
    values = confidence.values
    axes.scatter(severity, values, s=5, alpha=0.25, color=_BLUE, lw=0, rasterized=True)
    groups = np.array_split(np.argsort(severity, kind="stable"), min(20, len(severity)))
    center = [np.median(severity[group]) for group in groups]
    low, middle, high = np.transpose([np.quantile(values[group], (0.1, 0.5, 0.9)) for group in groups])
    axes.fill_between(center, low, high, color=_ORANGE, alpha=0.2, lw=0, label="10–90 %")
    axes.plot(center, middle, color=_ORANGE, lw=2.2, label="median")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return _png(figure)


def plot_reliability(reliability: Reliability) -> bytes:
    """Plots the mean cosine with the own center by decile of kappa over the one that kappa predicts."""
    figure, axes = _figure("Reliability of κ", "cosine that κ predicts", "mean cosine with the own center")
    predicted, observed = reliability.predicted, reliability.observed
    low, high = min(predicted.min(), observed.min()), max(predicted.max(), observed.max())
    axes.plot([low, high], [low, high], color=_GREY, lw=1.2, ls=":", label="as predicted")
    label = f"by decile of κ (mean difference {reliability.error:.3f})"
    axes.plot(predicted, observed, color=_ORANGE, lw=2.2, marker="o", label=label)
    axes.legend(frameon=False, title=f"κ fits these people times {reliability.factor:.3f}", alignment="left")
    return _png(figure)


def plot_confidence_histogram(confidence: Confidence, same: np.ndarray) -> bytes:
    """Plots the distribution of each pair's lower confidence, (P,): the share of genuine and of impostor pairs in each
    bin.
    """
    figure, axes = _figure(f"Lower {confidence.label} of a pair", confidence.label, "share of pairs")
    values = confidence.values
    positive = values[values > 0]  # a logarithmic axis has no place for 0
    edges = np.geomspace(positive.min(), positive.max() * (1 + 1e-9), 41).tolist() if len(positive) else 1
    for label, part, color in ("genuine", same, _BLUE), ("impostor", ~same, _ORANGE):
        weights = np.full(np.count_nonzero(part), 1 / np.count_nonzero(part))
        shown = values[part]
        axes.hist(shown, bins=edges, weights=weights, histtype="stepfilled", alpha=0.35, color=color, label=label)
        axes.hist(shown, bins=edges, weights=weights, histtype="step", color=color, lw=1.4)
    axes.set_xscale("log")
    axes.legend(frameon=False)
    return _png(figure)


def plot_scores(title: str, histogram: ScoreHistogram) -> bytes:
    """Plots the distribution of a likelihood: the share of genuine and of impostor comparisons in each bin, on a
    logarithmic axis.
    """
    against_chance = histogram.score is Score.VMF  # there is no uniform Gaussian that a score could be held against
    xlabel = f"{histogram.score.label}{' against chance' if against_chance else ''} [nats]"
    figure, axes = _figure(title, xlabel, "share of comparisons")
    edges = histogram.edges[::4]  # wider bins, or few genuine comparisons look like a comb
    for label, counts, color in ("genuine", histogram.genuine, _BLUE), ("impostor", histogram.impostor, _ORANGE):
        total = counts.sum()
        share = counts.reshape(-1, 4).sum(axis=1) / max(total, 1)
        axes.stairs(share, edges, color=color, alpha=0.35, fill=True)
        axes.stairs(share, edges, color=color, lw=1.4, label=f"{label} ({total:,})")
    axes.set_yscale("log")
    if against_chance:
        axes.axvline(0, color=_GREY, lw=1, ls=":")
    axes.legend(frameon=False)
    return _png(figure)


def _show(axes: "Axes", source: ImageSource, i: int, caption: str) -> None:
    axes.imshow(Image.fromarray(load_face(source, int(i))))
    axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8)


def _empty_grid(title: str, rows: int, columns: int, row_height: float) -> "tuple[Figure, np.ndarray]":
    """Returns a figure and its (rows, columns) axes without frames."""
    figure = _new_figure(figsize=(1.15 * columns, row_height * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid


def plot_faces(
    source: ImageSource, confidence: Confidence, severity: np.ndarray | None, columns: int = 10, rows: int = 2
) -> bytes:
    """Shows faces at evenly spaced ranks of confidence, from the lowest to the highest, with the confidence (and the
    known severity) under each.
    """
    order = np.argsort(confidence.values, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, columns * rows).round().astype(int))]
    figure, grid = _empty_grid(f"Faces by {confidence.label}, lowest to highest", rows, columns, 1.6)
    for axes, i in zip(grid.flat, chosen):
        known = "" if severity is None else f"\nseverity {severity[i]:.2f}"
        _show(axes, source, i, f"{confidence.label} {confidence.values[i]:.3g}{known}")
    return _png(figure)


def plot_pairs(
    source: ImageSource,
    scores: np.ndarray,
    same: np.ndarray,
    confidence: Confidence | None,
    score: str,
    columns: int = 5,
) -> bytes:
    """Shows the best and worst pairs of either kind: two faces side by side, the confidence under each (if it is not
    None) and the score above both.
    """
    order = np.argsort(scores, kind="stable")
    genuine, impostor = order[same[order]], order[~same[order]]
    kinds = {
        "worst genuine": genuine,
        "worst impostor": impostor[::-1],
        "best genuine": genuine[::-1],
        "best impostor": impostor,
    }
    figure, grid = _empty_grid(f"Best and worst pairs by {score}", len(kinds), 2 * columns, 1.55)
    for row, (kind, pairs) in zip(grid, kinds.items()):
        for column, pair in enumerate(pairs[:columns]):
            for axes, i in zip(row[2 * column :], (2 * pair, 2 * pair + 1)):
                caption = "" if confidence is None else f"{confidence.label} {confidence.values[i]:.3g}"
                _show(axes, source, i, caption)
            row[2 * column].set_title(
                f"{kind}: {scores[pair]:.3f}" if column == 0 else f"{scores[pair]:.3f}", fontsize=8, loc="left"
            )
    return _png(figure)
