"""The plots of the report. Each draws on axes and returns whether there was anything to draw."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.reporting.device import COLUMNS, EPOCHS, Device, projections

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, BASELINES, CACHED = "#1f77b4", ("#d62728", "#ff9f1c", "#8c6bb1", "#7f7f7f", "#bcbd22", "#e377c2"), "#17a398"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def plot_throughput(axes: "Axes", device: Device) -> bool:
    drawn = False
    batches: set[int] = set()
    for section, marker in (("stage1", "s"), ("stage2", "o")):
        lines: dict[tuple, list[tuple[int, float]]] = {}
        for timing in device.timings:
            if timing.section == section and " step, " in timing.work:
                facts = timing.facts
                lines.setdefault((facts["network"], facts.get("classes"), timing.way), []).append(
                    (facts["batch"], facts["per_second"])
                )
                batches.add(facts["batch"])
        colors = iter(BASELINES * len(lines))
        for (network, classes, way), points in lines.items():
            if "without" in way:
                continue
            color = CACHED if way == "cached" else OURS if way in ("ours", "scf_fast") else next(colors)
            identities = f", {classes:,} identities" if classes else ""
            axes.plot(
                *zip(*sorted(points)),
                marker=marker,
                color=color,
                label=f"stage {section[-1]}, {network}{identities}, {way}",
            )
            drawn = True
    axes.set(
        xscale="log", yscale="log", xlabel="images a step", ylabel="images/s", title="Training steps, without decoding"
    )
    axes.set_xticks(sorted(batches), labels=map(str, sorted(batches)))
    axes.minorticks_off()
    axes.legend()
    return drawn


def plot_memory(axes: "Axes", device: Device) -> bool:
    lines: dict[str, list[tuple[int, float]]] = {}
    for content in device.memory:
        lines.setdefault(f"stage 1 head, {content['centers_state']} momentum, whole", []).append(
            (content["classes"], content["peak_mib"])
        )
        lines.setdefault("logits of that batch alone", []).append((content["classes"], content["logits_mib"]))
    for timing in device.timings:
        if timing.section == "margin_softmax" and timing.way in ("scf_fast", "dense"):
            lines.setdefault(
                f"margin softmax, {timing.way}, B = {timing.facts['batch']}, beyond class centers", []
            ).append((timing.facts["classes"], timing.facts["peak_mib"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(set(points))), marker="o", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="identities", ylabel="peak MiB", title="Memory of the classifier, d = 512"
    )
    axes.legend()
    return bool(lines)


def plot_roofline(axes: "Axes", device: Device) -> bool:
    groups: dict[str, list[tuple[float, float]]] = {}
    for timing in device.timings:
        floor = device.floor(timing)
        if floor and (timing.way in ("scf_fast", "ours", "cached")):
            groups.setdefault(timing.section, []).append((floor[0], timing.median))
    for section, points in groups.items():
        floors, measured = zip(*points)
        axes.scatter(floors, measured, s=18, label=section)
    if groups:
        ends = [
            min(floor for points in groups.values() for floor, _ in points),
            max(floor for points in groups.values() for floor, _ in points),
        ]
        axes.plot(ends, ends, color="black", linewidth=1, label="floor")
        axes.plot(ends, [2 * end for end in ends], color="black", linewidth=1, linestyle=":", label="2 x floor")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="floor, s: bytes, FLOP or one launch",
        ylabel="measured, s",
        title="Ours against the floors",
    )
    axes.legend()
    return bool(groups)


def plot_speedups(axes: "Axes", device: Device) -> bool:
    bars: list[tuple[str, float]] = []
    for section in ("log_bessel", "scf_loss", "margin_softmax", "stage1", "stage2", "scoring"):
        for work, by_way in list(device.works(section).items())[::-1]:
            mine = by_way.get("scf_fast") or by_way.get("ours")
            others = {way: timing.median / mine.median for way, timing in by_way.items() if mine and not timing.ours}
            if others:  # the last work of each section is the largest
                bars += [(f"{work}\nagainst {way}", ratio) for way, ratio in others.items()]
                break
    bars.reverse()
    axes.barh(
        [name for name, _ in bars],
        [ratio for _, ratio in bars],
        color=[OURS if ratio >= 1 else BASELINES[0] for _, ratio in bars],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xscale="log", xlabel="times as fast", title="Ours against the others, largest sizes")
    return bool(bars)


def plot_projection(axes: "Axes", device: Device) -> bool:
    found, drawn = projections(device), False
    for offset, column in enumerate(COLUMNS):
        points = [
            (place + 0.16 * (offset - 2), found[name][column].hours)
            for place, name in enumerate(found)
            if column in found[name]
        ]
        if points:
            places, hours = zip(*points)
            axes.bar(
                places,
                hours,
                width=0.15,
                label=column,
                color=CACHED if "cached" in column else OURS if "ours" in column else BASELINES[0],
                alpha=0.55 if "stage 1" in column else 1,
            )
            drawn = True
    networks = sorted({projection.network for row in found.values() for projection in row.values()})
    axes.set(
        yscale="log",
        xticks=range(len(found)),
        xticklabels=list(found),
        ylabel="hours",
        title=f"Projected from step rates: {EPOCHS} epochs, one device, {', '.join(networks)}",
    )
    axes.legend()
    return drawn


PLOTS: dict[str, Callable[["Axes", Device], bool]] = {
    "throughput": plot_throughput,
    "memory": plot_memory,
    "roofline": plot_roofline,
    "speedups": plot_speedups,
    "projection": plot_projection,
}


def draw(device: Device, folder: Path) -> list[Path]:
    """Writes the plots that there are numbers for and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    with plt.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure, axes = plt.subplots(figsize=(8, 8 if name == "speedups" else 5), layout="constrained")
            if plot(axes, device):
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return written
