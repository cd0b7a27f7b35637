"""Everything that the result files of one device hold, and what follows from it for whole trainings."""

from dataclasses import dataclass
from typing import Any

from bench.measuring import roofline
from bench.measuring.results import ResultFile, Timing

DATA_SETS = {"MS1M": (5_800_000, 85_742), "Glint360K": (17_100_000, 360_000), "WebFace42M": (42_500_000, 2_060_000)}
"""{name: (images, identities)}"""
EPOCHS = 30
COLUMNS = ("stage 1, baseline", "stage 1, ours", "stage 2, baseline", "stage 2, ours", "stage 2, ours, cached")


@dataclass(frozen=True)
class Projection:
    """Computed time of EPOCHS epochs, and the network whose measured rate it rests on."""

    hours: float
    network: str


class Device:
    """The result files of one device.

    Attributes:
        timings: all timings, in the order of the files.
        machine: its measured rates, None where no file has them.
        memory: contents of the files on the memory of class centers, by kind of momentum and number of identities.
    """

    def __init__(self, name: str, files: list[ResultFile]) -> None:
        self.name, self.files = name, files
        self.timings = [timing for file in files for timing in file.timings]
        machines = [content["machine"] for content in self.contents("floors")]
        self.machine = roofline.Machine(**machines[0]) if machines else None
        self.memory = sorted(
            self.contents("center_memory"),
            key=lambda content: (content["centers_state"], content["classes"]),
        )

    @property
    def label(self) -> str:
        """Returns the device in words, with the versions that matter."""
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

    def contents(self, section: str) -> list[dict[str, Any]]:
        """Returns the contents of the files that name this section."""
        return [file.content for file in self.files if file.content.get("section") == section]

    def works(self, section: str) -> dict[str, dict[str, Timing]]:
        """Returns {work: {way: Timing}} in the order of the files."""
        found: dict[str, dict[str, Timing]] = {}
        for timing in self.timings:
            if timing.section == section:
                found.setdefault(timing.work, {})[timing.way] = timing
        return found

    def floor(self, timing: Timing) -> tuple[float, str] | None:
        """Returns (seconds, bound): from the file, or for stage 2, whose files have no floors, from the shapes."""
        facts = timing.facts
        if "floor_seconds" in facts:
            return facts["floor_seconds"], facts["bound"]
        if self.machine and timing.work.startswith("stage 2 step") and timing.way != "published, TF32":  # no rate of it
            dtype = "float32" if timing.way in ("published", "ours without bf16") else "bfloat16"
            return roofline.stage2_step(
                facts["network"], facts["confidence_net"], facts["batch"], dtype, timing.way == "cached"
            ).floor(self.machine)
        return None

    def best(self, section: str, prefix: str, ours: bool) -> Timing | None:
        """Returns the timing with the most items a second whose work begins with ``prefix``; caches are left out."""
        found = [
            timing
            for timing in self.timings
            if timing.section == section
            and timing.work.startswith(prefix)
            and timing.ours == ours
            and timing.way not in ("cached", "ours, cached")
        ]
        return max(found, key=lambda timing: timing.facts["per_second"], default=None)


def projections(device: Device) -> dict[str, dict[str, Projection]]:
    """Computes the time of EPOCHS epochs from the best measured rates, {data set: {column: Projection}}."""
    found: dict[str, dict[str, Projection]] = {}
    for name, (images, identities) in DATA_SETS.items():
        row: dict[str, Projection] = {}
        found[name] = row
        for ours, label in ((False, "baseline"), (True, "ours")):
            backbone = device.best("stage1", "stage 1 step", ours)
            if backbone:
                more_identities = identities - backbone.facts["classes"]
                seconds = 1 / backbone.facts["per_second"] + more_identities * head_seconds(device, ours)
                row[f"stage 1, {label}"] = Projection(EPOCHS * images * seconds / 3600, backbone.facts["network"])
            step = device.best("stage2", "stage 2 step", ours)
            if step:
                hours = EPOCHS * images / step.facts["per_second"] / 3600
                row[f"stage 2, {label}"] = Projection(hours, step.facts["network"])
        cached = [timing for timing in device.timings if timing.way == "cached"]
        if cached and "stage 2, ours" in row:
            best = max(cached, key=lambda timing: timing.facts["per_second"])
            first_epoch = row["stage 2, ours"].hours / EPOCHS
            row["stage 2, ours, cached"] = Projection(
                first_epoch + (EPOCHS - 1) * images / best.facts["per_second"] / 3600,
                best.facts["network"],
            )
    return found


def head_seconds(device: Device, ours: bool) -> float:
    """Returns the margin softmax's seconds per image and identity, at the largest number of identities measured."""
    found = [
        timing
        for timing in device.timings
        if timing.section == "margin_softmax" and timing.way == ("scf_fast" if ours else "dense")
    ]
    if not found:
        return 0.0
    largest = max(found, key=lambda timing: (timing.facts["classes"], timing.facts["batch"]))
    return largest.median / (largest.facts["batch"] * largest.facts["classes"])
