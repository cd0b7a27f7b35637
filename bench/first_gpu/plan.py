"""What the first minutes on a GPU are spent on, in this order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.measuring.environment import ROOT, is_installed

KERNEL_TESTS = ROOT / "tests" / "kernels"
_TINY_TEST = "test_template_pooling.py"  # under the interpreter it takes two seconds


@dataclass(frozen=True)
class Task:
    """One process: arguments of ``python -m``, and the modules without which it is left out."""

    words: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Stem of its log file."""
        return "-".join(Path(word).stem for word in self.words if not word.startswith("-"))[:80].replace(".", "_")

    def missing(self) -> list[str]:
        """Returns the needed modules that are not installed."""
        return [module for module in self.needs if not is_installed(module)]


@dataclass(frozen=True)
class Part:
    """Processes that share a time limit.

    Attributes:
        seconds: after which they are ended; what they have written stays.
        tasks: ``tasks(out, tiny)`` returns them, the most valuable first.
        at_once: how many of them run at the same time.
    """

    name: str
    shows: str
    seconds: int
    tasks: Callable[[Path, bool], list[Task]]
    at_once: int = 1


def _worker(name: str, needs: tuple[str, ...] = ()) -> Callable[[Path, bool], list[Task]]:
    def tasks(out: Path, tiny: bool) -> list[Task]:
        return [Task(("bench.first_gpu", "--worker", name, "--out", str(out), *["--tiny"] * tiny), needs)]

    return tasks


def _floors(out: Path, tiny: bool) -> list[Task]:
    return [Task(("bench.suite", "--worker", "floors", "--out", str(out), *["--tiny"] * tiny))]


def _kernel_tests(out: Path, tiny: bool) -> list[Task]:
    files = [KERNEL_TESTS / _TINY_TEST] if tiny else sorted(KERNEL_TESTS.glob("test_*.py"))
    chosen = ("-k", "interpreted") if tiny else ("-m", "gpu")
    return [
        Task(
            ("pytest", "-q", *chosen, f"--junitxml={out / f'{file.stem}.xml'}", str(file.relative_to(ROOT))),
            ("pytest",),
        )
        for file in files
    ]


def _kernels(out: Path, tiny: bool) -> list[Task]:
    return _worker("kernels")(out, tiny) + _worker("predictions")(out, tiny)


def _engine(out: Path, tiny: bool) -> list[Task]:
    tests = ("pytest", "-q", "-m", "gpu", f"--junitxml={out / 'test_features.xml'}", "tests/scf_fast/features")
    return _worker("engine", ("deepspeed",))(out, tiny) + [Task(tests, ("pytest",))] * (not tiny)


def _leftovers(out: Path, tiny: bool) -> list[Task]:
    sizes = ("--images", "200", "--batch", "16", "--batches", "1", "--rounds", "1") if tiny else ("--images", "20000")
    decoding = Task(("bench.decode", "--out", str(out), *sizes), ("nvidia.dali",))
    return _worker("stage1_compiled")(out, tiny) * (not tiny) + [decoding]


PARTS = (
    Part("floors", "versions, copy bandwidth, matrix rates, launch time", 40, _floors),
    Part("correctness", "every kernel on the chip against float64", 110, _kernel_tests, at_once=8),
    Part("kernels", "kernels against their floor and the prediction of their instruction counts", 80, _kernels, 2),
    Part("stage2", "steps of stage 2: the published way, ours, ours from the cache", 140, _worker("stage2")),
    Part("stage1", "steps of stage 1: dense, ours, ours through the engine", 70, _worker("stage1")),
    Part("engine", "engine steps of stage 2, DeepSpeed's timer on and off; feature tests", 60, _engine),
    Part("leftovers", "stage 1 compiled; decoding", 60, _leftovers),
)
