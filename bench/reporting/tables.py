"""The Markdown tables of the report. What no file holds is a cell that says "not measured"."""

from collections import Counter
from typing import Any

from bench.measuring.case import LEFT_OUT
from bench.measuring.chips import CHIPS
from bench.measuring.results import Timing
from bench.measuring.roofline import Machine
from bench.measuring.tables import markdown_table
from bench.reporting.device import COLUMNS, DATA_SETS, Device, projections
from bench.training import scaling


def duration(seconds: float) -> str:
    """Formats seconds in the unit that leaves at most three digits before the point."""
    unit, size = next(((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= size), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def timing_tables(device: Device, section: str) -> list[str]:
    """Returns a table for each kind of work, the kind being its name up to the first comma."""
    kinds: dict[str, dict[str, dict[str, Timing]]] = {}
    for work, by_way in device.works(section).items():
        kinds.setdefault(work.partition(",")[0], {})[work] = by_way
    return [timing_table(device, works) for works in kinds.values()] or [
        markdown_table(["work", "floor, bound"], [[None, None]])
    ]


def timing_cell(timing: Timing, floor: tuple[float, str] | None) -> str:
    """Returns time, rate where images are counted, and how many floors the time is."""
    facts = timing.facts
    rate = f", {facts['per_second']:,.0f} {facts['unit']}/s" if facts.get("unit") == "images" else ""
    return f"{duration(timing.median)}{rate}" + (f" ({timing.median / floor[0]:.1f} x)" if floor else "")


def timing_table(device: Device, works: dict[str, dict[str, Timing]]) -> str:
    """Returns a row for each piece of work: the floor, then each way."""
    ways = list(dict.fromkeys(way for by_way in works.values() for way in by_way))
    rows = []
    for work, by_way in works.items():
        floors = {way: device.floor(timing) for way, timing in by_way.items()}
        cells = [timing_cell(by_way[way], floors[way]) if way in by_way else None for way in ways]
        floor = next((floors[way] for way in ways if floors.get(way)), None)
        rows.append([work, f"{duration(floor[0])}, {floor[1]}" if floor else None, *cells])
    return markdown_table(["work", "floor, bound", *ways], rows)


def left_out(device: Device, section: str) -> str:
    """Returns a line for each way and reason for which cases of the section have no time."""
    reasons = Counter(
        (record["way"], kind, record[kind].splitlines()[0])
        for content in device.contents(section)
        for record in content.get("records", ())
        for kind in LEFT_OUT
        if kind in record
    )
    return "\n".join(
        f"- {way}, {count} case{'' if count == 1 else 's'} {kind.replace('_', ' ')}: {reason}"
        for (way, kind, reason), count in reasons.items()
    )


def machine_table(machine: Machine | None) -> str:
    return markdown_table(
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


def memory_table(device: Device) -> str:
    return markdown_table(
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


def decoding_table(device: Device) -> str:
    files = [
        file.content
        for file in device.files
        if "images_per_second" in file.content and "decoding" in file.content["images_per_second"]
    ]
    rows = [
        [name, f"{rate:,.0f}"] for content in files for name, rate in content["images_per_second"]["decoding"].items()
    ]
    return markdown_table(["decoded and normalized", "images/s"], rows or [[None] * 2])


def scaling_part(device: Device) -> list[str]:
    """Returns the bytes of real collectives and the model for many GPUs, where they were computed on this device."""
    parts = []
    for content in device.contents("scaling"):
        parts += [
            "### Several ranks: bytes counted, and a model",
            scaling.volume_table(content["measured"]),
            scaling.overlap_line(content["measured"]),
        ]
        if "model" in content:
            parts += [scaling.assumptions_line(content["assumptions"]), scaling.model_table(content["model"])]
    return parts


def projection_table(device: Device) -> str:
    found = projections(device)
    return markdown_table(
        ["projected, hours", *COLUMNS],
        [
            [
                f"{name}, {images / 1e6:.1f} M images, {identities:,} identities",
                *(
                    f"{found[name][column].hours:,.1f} ({found[name][column].network})"
                    if column in found[name]
                    else None
                    for column in COLUMNS
                ),
            ]
            for name, (images, identities) in DATA_SETS.items()
        ],
    )


def instructions_part(device: Device) -> list[str]:
    """Returns what the compiled kernels let expect, where they were counted on this machine."""
    return [text for content in device.contents("instructions") for text in _instructions(content["records"])]


def _instructions(records: list[dict[str, Any]]) -> list[str]:
    by_work: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        by_work.setdefault(record["work"], {})[record["architecture"]] = record
    chips = [chip.name for chip in CHIPS]
    rows, spills = [], []
    for work, by_architecture in by_work.items():
        shares = {chip: share for record in by_architecture.values() for chip, share in record["possible"].items()}
        shown = by_architecture.get(90) or next(iter(by_architecture.values()))
        rows.append(
            [
                work,
                f"{shown['instructions']:,.4g} per {shown['unit']}",
                "" if shown["beside"] is None else f"{shown['beside']:,.4g}",
                f"{shown['registers']}, {shown['occupancy']:.0%}",
                *(f"{shares[chip]:.0%}" if chip in shares else None for chip in chips),
            ]
        )
        spills += [
            f"{work} on sm_{architecture}: {record['spilled']} bytes"
            for architecture, record in by_architecture.items()
            if record["spilled"]
        ]
    compiled_for = sorted({record["architecture"] for record in records})
    return [
        "### Predicted: what the kernels' instructions allow",
        "Not measured but counted in the compiled kernels (`python -m bench.instructions`, which needs no GPU): a "
        "thread's instructions for one unit, compiled for sm_90, all of them and without those that multiply in a "
        "matrix product; registers and resident warps; and the share of its copy bandwidth (products: of its tensor "
        "cores' rate, of its FMA rate for float32) that a GPU can reach at most if its schedulers issue in every "
        "clock, each class of instructions runs at its rate and everything overlaps ([chips.py](measuring/chips.py)). "
        "Loops that run as the data want count once.",
        markdown_table(["kernel", "instructions", "beside the product", "registers, occupancy", *chips], rows),
        f"Compiled for {', '.join(f'sm_{architecture}' for architecture in compiled_for)}; "
        + (f"registers spill in {'; '.join(spills)}." if spills else "no registers spill."),
    ]
