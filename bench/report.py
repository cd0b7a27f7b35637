"""Tables and plots of the result files: bench/RESULTS.md, and PNG files beside the JSON of each device.

    python -m bench.report [--results bench/results] [--out bench/RESULTS.md]

Of each kind of result the newest file counts. What no file holds is a cell that says "not measured".
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from bench.measuring import roofline
from bench.measuring.case import LEFT_OUT
from bench.measuring.environment import RESULTS
from bench.measuring.results import by_device, table
from bench.training import scaling

# images, identities
DATA_SETS = {"MS1M": (5_800_000, 85_742), "Glint360K": (17_100_000, 360_000), "WebFace42M": (42_500_000, 2_060_000)}
EPOCHS = 30
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


class Device:
    """What the files of one device hold."""

    def __init__(self, name, files):
        self.name, self.files = name, files
        self.timings = [timing for file in files for timing in file.timings]
        machines = [file.content["machine"] for file in files if file.content.get("section") == "floors"]
        self.machine = roofline.Machine(**machines[0]) if machines else None
        self.memory = sorted(
            (file.content for file in files if file.content.get("section") == "center_memory"),
            key=lambda content: (content["centers_state"], content["classes"]),
        )

    @property
    def label(self):
        environment = next(
            (file.environment for file in self.files if file.content.get("section") == "floors"),
            self.files[0].environment,
        )
        cpu = (
            f", {environment['cpu']}, {environment['threads']} thread{'' if environment['threads'] == 1 else 's'}"
            if environment["device"] == "cpu"
            else ""
        )
        return f"{environment['device']}{cpu}, torch {environment['torch']}"

    def works(self, section):
        """{work: {way: Timing}} in the order of the files."""
        found = {}
        for timing in self.timings:
            if timing.section == section:
                found.setdefault(timing.work, {})[timing.way] = timing
        return found

    def floor(self, timing):
        """(seconds, bound) or None: from the file, or for steps of stage 2, whose files have none, from the shapes."""
        facts = timing.facts
        if "floor_seconds" in facts:
            return facts["floor_seconds"], facts["bound"]
        if self.machine and timing.work.startswith("stage 2 step"):
            dtype = "float32" if timing.way in ("published", "ours without bf16") else "bfloat16"
            return roofline.stage2_step(
                facts["network"], facts["confidence_net"], facts["batch"], dtype, timing.way == "cached"
            ).floor(self.machine)
        return None

    def best(self, section, prefix, mine):
        """The fastest Timing by items a second of works that begin so, of ours or of the others; None where there is
        none.
        """
        found = [
            timing
            for timing in self.timings
            if timing.section == section
            and timing.work.startswith(prefix)
            and timing.ours == mine
            and timing.way not in ("cached", "ours, cached")
        ]
        return max(found, key=lambda timing: timing.facts["per_second"], default=None)


def duration(seconds):
    """In a unit that leaves three figures in front of the point at most."""
    unit, size = next(((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= size), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def timing_tables(device, section):
    """A table for each kind of work, which is its name up to the first comma."""
    kinds = {}
    for work, by_way in device.works(section).items():
        kinds.setdefault(work.partition(",")[0], {})[work] = by_way
    return [timing_table(device, works) for works in kinds.values()] or [
        table(["work", "floor, bound"], [[None, None]])
    ]


def timing_table(device, works):
    """A row for each piece of work: the floor, then each way with its time and how many floors that is."""
    ways = list(dict.fromkeys(way for by_way in works.values() for way in by_way))
    rows = []
    for work, by_way in works.items():
        cells, floor = [], None
        for way in ways:
            timing = by_way.get(way)
            floor_of_way = timing and device.floor(timing)
            if timing is None:
                cells.append(None)
                continue
            rate = (
                f", {timing.facts['per_second']:,.0f} {timing.facts['unit']}/s"
                if timing.facts.get("unit") == "images"
                else ""
            )
            cells.append(
                f"{duration(timing.median)}{rate}"
                + (f" ({timing.median / floor_of_way[0]:.1f} x)" if floor_of_way else "")
            )
            floor = floor or floor_of_way
        rows.append([work, f"{duration(floor[0])}, {floor[1]}" if floor else None, *cells])
    return table(["work", "floor, bound", *ways], rows)


def left_out(device, section):
    """A line for each way and reason that cases of the section have no time for."""
    reasons = Counter(
        (record["way"], kind, record[kind].splitlines()[0])
        for file in device.files
        if file.content.get("section") == section
        for record in file.content.get("records", ())
        for kind in LEFT_OUT
        if kind in record
    )
    return "\n".join(
        f"- {way}, {count} case{'' if count == 1 else 's'} {kind.replace('_', ' ')}: {reason}"
        for (way, kind, reason), count in reasons.items()
    )


def machine_table(machine):
    return table(
        ["copy bandwidth", "bf16 products", "float32 products", "launch"],
        [
            [
                f"{machine.copy_bytes_per_second / 1e9:.4g} GB/s",
                *(f"{machine.flops_per_second[dtype] / 1e12:.3g} TFLOP/s" for dtype in ("bfloat16", "float32")),
                duration(machine.launch_seconds),
            ]
        ]
        if machine
        else [[None] * 4],
    )


def memory_table(device):
    return table(
        ["identities", "momentum", "batch", "class centers and states", "peak", "ratio", "logits would be"],
        [
            [
                f"{c['classes']:,}",
                c["centers_state"],
                c["batch"],
                f"{c['stored_mib']:,.0f} MiB",
                f"{c['peak_mib']:,.0f} MiB",
                f"{c['peak_over_stored']:.3f}",
                f"{c['logits_mib']:,.0f} MiB",
            ]
            for c in device.memory
        ]
        or [[None] * 7],
    )


def decoding_table(device):
    files = [
        file.content
        for file in device.files
        if "images_per_second" in file.content and "decoding" in file.content["images_per_second"]
    ]
    rows = [
        [name, f"{rate:,.0f}"] for content in files for name, rate in content["images_per_second"]["decoding"].items()
    ]
    return table(["decoded and normalized", "images/s"], rows or [[None] * 2])


def projections(device):
    """{data set: {what: (hours, of which network)}} for EPOCHS epochs on one device of this kind, from its best
    measured rates.
    """
    found = {}
    for name, (images, identities) in DATA_SETS.items():
        row = found[name] = {}
        for mine, label in ((False, "baseline"), (True, "ours")):
            backbone = device.best("stage1", "stage 1 step", mine)
            if backbone:
                seconds = 1 / backbone.facts["per_second"] + (identities - backbone.facts["classes"]) * head_seconds(
                    device, mine
                )
                row[f"stage 1, {label}"] = EPOCHS * images * seconds / 3600, backbone.facts["network"]
            step = device.best("stage2", "stage 2 step", mine)
            if step:
                row[f"stage 2, {label}"] = EPOCHS * images / step.facts["per_second"] / 3600, step.facts["network"]
        cached = [timing for timing in device.timings if timing.way == "cached"]
        if cached and f"stage 2, {'ours'}" in row:
            best = max(cached, key=lambda timing: timing.facts["per_second"])
            first_epoch = row["stage 2, ours"][0] / EPOCHS
            row["stage 2, ours, cached"] = (
                first_epoch + (EPOCHS - 1) * images / best.facts["per_second"] / 3600,
                best.facts["network"],
            )
    return found


def head_seconds(device, mine):
    """Seconds an image and identity of the margin softmax, at the largest number of identities measured."""
    found = [
        timing
        for timing in device.timings
        if timing.section == "margin_softmax" and timing.way == ("scf_fast" if mine else "dense")
    ]
    if not found:
        return 0.0
    largest = max(found, key=lambda timing: (timing.facts["classes"], timing.facts["batch"]))
    return largest.median / (largest.facts["batch"] * largest.facts["classes"])


def scaling_part(device):
    """Bytes of real collectives, and the model for many GPUs, where that was run on this device."""
    parts = []
    for content in (file.content for file in device.files if file.content.get("section") == "scaling"):
        parts += [
            "### Several ranks: bytes counted, and a model",
            scaling.volume_table(content["measured"]),
            scaling.overlap_line(content["measured"]),
        ]
        if "model" in content:
            parts += [scaling.assumptions_line(content["assumptions"]), scaling.model_table(content["model"])]
    return parts


COLUMNS = ("stage 1, baseline", "stage 1, ours", "stage 2, baseline", "stage 2, ours", "stage 2, ours, cached")


def projection_table(device):
    found = projections(device)
    return table(
        ["projected, hours", *COLUMNS],
        [
            [
                f"{name}, {images / 1e6:.1f} M images, {identities:,} identities",
                *(
                    f"{found[name][column][0]:,.1f} ({found[name][column][1]})" if column in found[name] else None
                    for column in COLUMNS
                ),
            ]
            for name, (images, identities) in DATA_SETS.items()
        ],
    )


# ---- plots: each draws on axes and says whether there was anything to draw


def plot_throughput(axes, device):
    drawn, batches = False, set()
    for section, marker in (("stage1", "s"), ("stage2", "o")):
        lines = {}
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


def plot_memory(axes, device):
    lines = {}
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


def plot_roofline(axes, device):
    groups = {}
    for timing in device.timings:
        floor = device.floor(timing)
        if floor and (timing.way in ("scf_fast", "ours", "cached")):
            groups.setdefault(timing.section, []).append((floor[0], timing.median))
    for section, points in groups.items():
        axes.scatter(*zip(*points), s=18, label=section)
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


def plot_speedups(axes, device):
    bars = []
    for section in ("log_bessel", "scf_loss", "margin_softmax", "stage1", "stage2", "scoring"):
        for work, by_way in list(device.works(section).items())[::-1]:
            mine = by_way.get("scf_fast") or by_way.get("ours")
            others = {way: timing.median / mine.median for way, timing in by_way.items() if mine and not timing.ours}
            if others:  # the last, that is the largest, of each section
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


def plot_projection(axes, device):
    found, drawn = projections(device), False
    for offset, column in enumerate(COLUMNS):
        points = [
            (place + 0.16 * (offset - 2), found[name][column][0])
            for place, name in enumerate(found)
            if column in found[name]
        ]
        if points:
            axes.bar(
                *zip(*points),
                width=0.15,
                label=column,
                color=CACHED if "cached" in column else OURS if "ours" in column else BASELINES[0],
                alpha=0.55 if "stage 1" in column else 1,
            )
            drawn = True
    networks = sorted({network for row in found.values() for _, network in row.values()})
    axes.set(
        yscale="log",
        xticks=range(len(found)),
        xticklabels=list(found),
        ylabel="hours",
        title=f"Projected from step rates: {EPOCHS} epochs, one device, {', '.join(networks)}",
    )
    axes.legend()
    return drawn


PLOTS = {
    "throughput": plot_throughput,
    "memory": plot_memory,
    "roofline": plot_roofline,
    "speedups": plot_speedups,
    "projection": plot_projection,
}


def draw(device, folder):
    """Write the plots that there are numbers for; their paths."""
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


TABLES = {
    "log_bessel": "Log-Bessel family",
    "scf_loss": "SCF loss",
    "margin_softmax": "Margin softmax",
    "stage1": "Stage 1, steps",
    "stage2": "Stage 2, steps and epochs",
    "scoring": "Scoring",
}


def describe(device, folder, out):
    """The device's part of the page."""
    parts = [f"## {device.label}", machine_table(device.machine)]
    for section, title in TABLES.items():
        parts += [f"### {title}", *timing_tables(device, section), *filter(None, [left_out(device, section)])]
    parts += ["### Memory of stage 1's class centers", memory_table(device), "### Decoding", decoding_table(device)]
    parts += [
        f"### Projected: {EPOCHS} epochs on one such device",
        "Not measured but computed: images times epochs over the best step rate above, for stage 1 with the margin "
        "softmax's time scaled to the "
        "identities; decoding, checkpoints and evaluation are left out. The network that was measured is named.",
        projection_table(device),
        *scaling_part(device),
    ]
    parts += [f"![{path.stem}]({path.relative_to(out.parent).as_posix()})" for path in draw(device, folder)]
    rows = []
    for file in device.files:
        environment = file.environment
        rows.append(
            [
                f"[{file.path.name}]({file.path.relative_to(out.parent).as_posix()})",
                environment["date"],
                f"`{environment.get('command')}`",
                environment["commit"],
                "" if file.content.get("complete", True) else "interrupted",
            ]
        )
    return "\n\n".join([*parts, "### Files", table(["file", "date", "command", "revision", ""], rows)])


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder with a folder for each device (default: bench/results)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "RESULTS.md")
    options = parser.parse_args(arguments)
    options.out, options.results = options.out.resolve(), options.results.resolve()
    devices = [Device(name, files) for name, files in by_device(options.results).items()]
    if not devices:
        parser.error(
            f"{options.results} must hold a folder of JSON files for each device; python -m bench.suite writes them"
        )
    intro = [
        "# Results",
        "Written by `python -m bench.report` from the files under `results/`; what each measures is in "
        "[README.md](README.md). Times are "
        "medians of calls on fresh random data, the wait for the device included. A floor is the least time that "
        "bytes, FLOP or one launch allow at "
        "the rates measured in the same run ([roofline.py](roofline.py)); the figure in brackets is how many floors a "
        "way takes.",
    ]
    if not any(device.name != "cpu" for device in devices):
        intro.append("No GPU has been at hand: every GPU figure is **not measured**.")
    options.out.write_text(
        "\n\n".join([*intro, *(describe(device, options.results / device.name, options.out) for device in devices)])
        + "\n"
    )
    print(f"Written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
