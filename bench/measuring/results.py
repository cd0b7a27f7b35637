"""Result files: written with a record a line, and read back into one form whichever program wrote them."""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measuring.environment import DEVICE, RESULTS, device_slug
from bench.measuring.samples import Samples, median_interval
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output

_LINE = 120  # characters up to which an object stays on one line


def write_json(path: Path, content: object) -> None:
    """Replaces the file whole or not at all, so that a reader or an interruption never finds it half written."""
    text = _layout(content) + "\n"
    with atomic_output(path, sync=False) as file:
        file.write(text.encode())


def _layout(value: object, depth: int = 0) -> str:
    """Formats JSON for reading: every record of a list on one line, and every object that fits one."""
    flat = json.dumps(value)
    short = len(flat) + depth <= _LINE
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list) for item in value):
        return "[" + inner + ("," + inner).join(json.dumps(item) for item in value) + outer + "]"
    if isinstance(value, dict) and value and not short:
        # A key goes through json.dumps as part of an object, which turns numbers into strings.
        pairs = (json.dumps({key: None})[1:-5] + _layout(item, depth + 1) for key, item in value.items())
        return "{" + inner + ("," + inner).join(pairs) + outer + "}"
    return flat


def add_out_argument(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """Adds ``--out``, the folder for a program's JSON file, by default ``bench/results/<device>``."""
    parser.add_argument(
        "--out",
        type=Path,
        default=default or RESULTS / device_slug(DEVICE),
        help="folder for the JSON file (default: bench/results/<device>)",
    )


@dataclass(frozen=True)
class Timing:
    """Seconds that one way takes for one piece of work.

    Attributes:
        low, high: an interval that holds the true median with about 95 % probability (``samples.median_interval``);
            both are None where there are fewer than 5 samples.
        facts: everything else that the file says about it.
    """

    section: str
    work: str
    way: str
    median: float
    low: float | None
    high: float | None
    facts: dict[str, Any]

    @property
    def ours(self) -> bool:
        return self.way.startswith(("scf_fast", "ours", "cached"))


def _from_samples(section: str, work: str, way: str, seconds: list[float] | dict, facts: dict[str, Any]) -> Timing:
    samples = Samples.from_json(seconds)
    return Timing(section, work, way, samples.median, samples.low, samples.high, facts)


def _from_pytest(section: str, entry: dict[str, Any]) -> Timing:
    stats, facts = entry["stats"], entry["extra_info"]
    way = facts.get("way") or entry["name"].rpartition("-")[2].rstrip("]")
    interval = median_interval(stats["median"], stats["q1"], stats["q3"], stats["rounds"])
    return Timing(section, entry["group"], way, stats["median"], *interval, facts)


def _from_throughput(content: dict[str, Any]) -> list[Timing]:
    found, net = [], content["confidence_net"]
    for network, result in content["results"].items():
        runs = [("step", int(batch), rates) for batch, rates in result["steps"].items()] + [
            ("epoch", content["epoch_batch"], result.get("epochs", {}))
        ]
        for unit, batch, rates in runs:
            facts = {"network": network, "confidence_net": net, "batch": batch, "unit": "images"}
            found += [
                _from_samples(
                    "stage2",
                    f"stage 2 {unit}, {network}, {net}, B = {batch}",
                    way,
                    [batch / rate for rate in samples],
                    {**facts, "per_second": statistics.median(samples)},
                )
                for way, samples in rates.items()
            ]
    return found


@dataclass(frozen=True)
class ResultFile:
    """A JSON file that a benchmark wrote."""

    path: Path
    content: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Device, versions, date and command."""
        return self.content.get("environment") or self.content.get("machine_info") or self.content

    @property
    def section(self) -> str:
        """The section it belongs to: what it says itself, else the first word of its name."""
        return self.content.get("section", self.path.stem.partition("-")[0])

    @property
    def timings(self) -> list[Timing]:
        """Its timings; empty for a file of another kind, such as errors or memory."""
        content = self.content
        if "records" in content:
            return [
                _from_samples(self.section, record["work"], record["way"], record["seconds"], record)
                for record in content["records"]
                if "seconds" in record
            ]
        if "benchmarks" in content:
            return [_from_pytest(self.section, entry) for entry in content["benchmarks"]]
        if "cases" in content:
            return [
                _from_samples(self.section, case["work"], way, seconds, {})
                for case in content["cases"]
                for way, seconds in case["seconds"].items()
            ]
        return _from_throughput(content) if "networks" in content else []


def read(path: Path | str) -> ResultFile:
    """Reads one result file.

    Raises:
        InputError: the file is not there, or not JSON.
    """
    try:
        return ResultFile(Path(path), json.loads(Path(path).read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: must be a JSON file that a benchmark wrote, but {error}") from None


def by_device(folder: Path = RESULTS) -> dict[str, list[ResultFile]]:
    """Reads the newest file of each kind for every device; the kind is the file's name without device and date."""
    found = {}
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        newest: dict[str, ResultFile] = {}
        for path in sorted(device.glob("*.json")):
            file = read(path)
            kind = path.stem.removesuffix(f"-{file.environment['date']}").removesuffix(f"-{device.name}")
            if kind not in newest or newest[kind].environment["date"] <= file.environment["date"]:
                newest[kind] = file
        if newest:
            found[device.name] = list(newest.values())
    return found
