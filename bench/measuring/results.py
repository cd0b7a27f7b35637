"""Result files read back into one form, whichever program wrote them."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.measuring.environment import RESULTS

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Timing:
    """Seconds of one way of doing one piece of work.

    Attributes:
        low, high: an interval that holds the true median with about 95 % probability: median +- 1.57 IQR / sqrt(n)
            (McGill, Tukey and Larsen, 1978); None where there are fewer than 5 samples.
        facts: everything else in the file about it.
    """

    section: str
    work: str
    way: str
    median: float
    low: float | None
    high: float | None
    facts: dict

    @property
    def ours(self):
        return self.way.startswith(("scf_fast", "ours", "cached"))


def _interval(median, first_quartile, third_quartile, count):
    if count < 5:
        return None, None
    half = 1.57 * (third_quartile - first_quartile) / math.sqrt(count)
    return median - half, median + half


def _from_samples(section, work, way, seconds, facts):
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(section, work, way, median, *_interval(median, first, third, len(seconds)), facts)


def _from_pytest(section, entry):
    stats, facts = entry["stats"], entry["extra_info"]
    way = facts.get("way") or entry["name"].rpartition("-")[2].rstrip("]")
    return Timing(
        section,
        entry["group"],
        way,
        stats["median"],
        *_interval(stats["median"], stats["q1"], stats["q3"], stats["rounds"]),
        facts,
    )


def _from_throughput(content):
    found, net = [], content["confidence_net"]
    for network, result in content["results"].items():
        runs = [("step", int(batch), rates) for batch, rates in result["steps"].items()] + [
            ("epoch", content["epoch_batch"], result.get("epochs", {}))
        ]
        for what, batch, rates in runs:
            facts = {"network": network, "confidence_net": net, "batch": batch, "unit": "images"}
            found += [
                _from_samples(
                    "stage2",
                    f"stage 2 {what}, {network}, {net}, B = {batch}",
                    way,
                    [batch / rate for rate in samples],
                    {**facts, "per_second": statistics.median(samples)},
                )
                for way, samples in rates.items()
            ]
    return found


@dataclass(frozen=True)
class ResultFile:
    path: Path
    content: dict

    @property
    def environment(self):
        """Device, versions, date and command."""
        return self.content.get("environment") or self.content.get("machine_info") or self.content

    @property
    def timings(self):
        """[Timing]; empty for files of another kind, such as errors or memory."""
        content, section = self.content, self.content.get("section", self.path.stem.partition("-")[0])
        if "records" in content:
            return [
                _from_samples(section, record["work"], record["way"], record["seconds"], record)
                for record in content["records"]
                if "seconds" in record
            ]
        if "benchmarks" in content:
            return [_from_pytest(section, entry) for entry in content["benchmarks"]]
        if "cases" in content:
            return [
                _from_samples(section, case["work"], way, seconds, {})
                for case in content["cases"]
                for way, seconds in case["seconds"].items()
            ]
        return _from_throughput(content) if "networks" in content else []


def read(path):
    """A ResultFile.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return ResultFile(Path(path), json.loads(Path(path).read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: must be a JSON file that a benchmark wrote, but {error}") from None


def by_device(folder=RESULTS):
    """{device: [ResultFile]}: of each kind of file, which is its name without device and date, the newest alone."""
    found = {}
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        newest = {}
        for path in sorted(device.glob("*.json")):
            file = read(path)
            kind = path.stem.removesuffix(f"-{file.environment['date']}").removesuffix(f"-{device.name}")
            if kind not in newest or newest[kind].environment["date"] <= file.environment["date"]:
                newest[kind] = file
        if newest:
            found[device.name] = list(newest.values())
    return found


def table(head, rows):
    """Markdown; None is a cell that says so."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(NOT_MEASURED if cell is None else str(cell) for cell in line) + " |" for line in lines
    )
