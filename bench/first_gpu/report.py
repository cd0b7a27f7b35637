"""The report of the first minutes: what was measured, set against what was predicted."""

import json
import re
from pathlib import Path
from typing import Any

from bench.first_gpu.workers import CHOSEN
from bench.measuring.case import LEFT_OUT
from bench.measuring.chips import CHIPS
from bench.measuring.tables import text_table

_FAR_OFF = 1.5  # times the prediction, from which on a line is marked


def _read(path: Path) -> dict[str, Any]:
    """Returns a file's content; empty where a part has not come to write it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _chip_of(device: str) -> str | None:
    """Returns the name in the data sheets of a device as PyTorch calls it."""
    return next((chip.name for chip in CHIPS if chip.name.split()[-1] in device), None)


def predicted_seconds(record: dict[str, Any], predictions: dict[str, Any], chip: str | None) -> float | None:
    """Returns the least time that the instructions of a case's kernels allow; None where nothing was counted for it.

    The share of the floor that the slowest of its kernels can reach is taken for all of them.
    """
    counted = {entry["work"]: entry["possible"] for entry in predictions.get("records", [])}
    for chosen in CHOSEN:
        if record["way"] in chosen.ways and record["way"].startswith("scf_fast") and chip is not None:
            shares = [counted[work].get(chip) for work in chosen.kernels if work in counted]
            if (
                re.fullmatch(chosen.work, record["work"])
                and shares
                and len(shares) == len(chosen.kernels)
                and all(shares)
            ):
                return record["floor_seconds"] / min(shares)
    return None


def _kernel_lines(out: Path, chip: str | None) -> list[str]:
    predictions, rows = _read(out / "predictions.json"), []
    for record in _read(out / "kernels.json").get("records", []):
        reason = next((f"{kind}: {record[kind]}" for kind in LEFT_OUT if kind in record), None)
        if reason is not None:
            rows.append([record["work"], record["way"], reason[:60], "", "", ""])
            continue
        predicted = predicted_seconds(record, predictions, chip)
        ratio = None if predicted is None else record["median_seconds"] / predicted
        rows.append(
            [
                record["work"],
                record["way"],
                f"{1e3 * record['median_seconds']:.4g}",
                f"{record['times_floor']:.2f}",
                "" if predicted is None else f"{1e3 * predicted:.4g}",
                "" if ratio is None else f"{ratio:.2f}" + " !" * (ratio > _FAR_OFF or ratio < 1),
            ]
        )
    lines = [text_table(["kernels", "way", "ms", "x floor", "predicted ms", "x prediction"], rows)] if rows else []
    failures = predictions.get("failures", [])
    if rows:
        lines.append(
            f"! : over {_FAR_OFF} x the prediction; or below it, which cannot be if bench/measuring/chips.py is right"
        )
    return lines + [f"not counted: {failure}" for failure in failures]


def _step_lines(out: Path, name: str, title: str) -> list[str]:
    content = _read(out / f"{name}.json")
    rows = [
        [record["work"], record["way"], f"{record['per_second']:.0f}"]
        if "per_second" in record
        else [record["work"], record["way"], next(f"{kind}: {record[kind]}" for kind in LEFT_OUT if kind in record)]
        for record in content.get("records", [])
    ]
    lines = [text_table([title, "way", "images/s"], rows)] if rows else []
    return lines + [f"left out: {way}: {why}" for way, why in content.get("left_out", {}).items()]


def _engine_lines(out: Path) -> list[str]:
    records = _read(out / "first_gpu_engine.json").get("records", [])
    rows = [[entry["way"], f"{1e3 * entry['median_seconds']:.3f}", str(entry["synchronizations"])] for entry in records]
    return [text_table(["engine steps", "ms", "synchronizations a step"], rows)] if rows else []


def _outcome_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    for part, outcomes in summary.get("parts", {}).items():
        for outcome in outcomes:
            counts = outcome["tests"]
            if outcome["status"] != "ok" or counts is not None:
                tests = "" if counts is None else ", ".join(f"{number} {kind}" for kind, number in counts.items())
                lines.append(f"{part}: {outcome['status']}: {outcome['command'].split(' --out')[0]} {tests}".rstrip())
        if not outcomes:
            lines.append(f"{part}: no time was left for it")
    return lines


def write_report(out: Path, path: Path) -> None:
    """Writes the report of the files in the folder, whichever there are."""
    summary = _read(out / "first_gpu.json")
    facts = summary.get("environment", {})
    device = str(facts.get("device"))
    floors = _read(out / "floors.json").get("machine", {})
    head = [
        f"{device}, torch {facts.get('torch')}, CUDA {facts.get('cuda')}, Triton {facts.get('triton')}, commit "
        f"{facts.get('commit')}, {facts.get('date')}",
        *(["TINY SIZES: the figures mean nothing"] if summary.get("tiny") else []),
    ]
    if floors:
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in floors["flops_per_second"].items())
        head.append(
            f"copy {floors['copy_bytes_per_second'] / 1e12:.3g} TB/s, {rates}, "
            f"launch {1e6 * floors['launch_seconds']:.1f} us"
        )
    blocks = [
        head,
        _outcome_lines(summary),
        _kernel_lines(out, _chip_of(device)),
        _step_lines(out, "first_gpu_stage2", "stage 2"),
        _step_lines(out, "stage1", "stage 1"),
        _step_lines(out, "stage1_compiled", "stage 1"),
        _engine_lines(out),
    ]
    path.write_text("\n\n".join("\n".join(block) for block in blocks if block) + "\n")
