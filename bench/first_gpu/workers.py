"""The parts that measure, each run in a process of its own; they rewrite their file after each result."""

import importlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import suite
from bench.measuring import roofline
from bench.measuring.case import Case
from bench.measuring.environment import DEVICE, environment
from bench.measuring.results import write_json

_BUDGET = 0.1  # seconds to sample a case for
_TINY_BUDGET = 0.005
_PROCESSES = 8  # that compile for the predictions


@dataclass(frozen=True)
class Chosen:
    """Cases of a section of the suite, and the kernels whose instructions bound them.

    Attributes:
        section: of the suite.
        work: pattern that all of a case's name must match.
        ways: in order of their value; ours first.
        kernels: names in ``bench.kernels.catalog`` of what our way launches; none where the catalog counts another
            form, as it does of pairs (one partner a row).
    """

    section: str
    work: str
    ways: tuple[str, ...]
    kernels: tuple[str, ...]


CHOSEN = (
    Chosen(
        "scf_loss",
        r"scf_loss, forward_backward \(confidence\), B = (1024|16384), C = 85742",
        ("scf_fast", "published", "eager"),
        ("SCF loss, float32, d = 512",),
    ),
    Chosen(
        "scf_loss",
        r"scf_loss, forward_backward \(finetune\), B = 16384, C = 85742",
        ("scf_fast", "published"),
        ("SCF loss with coefficients and terms, float32, d = 512", "gradient of features, float32, d = 512"),
    ),
    Chosen(
        "objective_losses",
        r"SCF-G, forward_backward, B = 4096",
        ("scf_fast", "eager"),
        ("Gaussian center loss with coefficients, scalar, float32, d = 512",),
    ),
    Chosen(
        "objective_losses",
        r"(PFE-G, diagonal|PFE-v), forward_backward, B = 4096",
        ("scf_fast", "eager"),
        (),
    ),
    Chosen(
        "log_bessel",
        r"log_vmf_normalizer, value_and_gradient, (4194304|67108864) values",
        ("scf_fast", "eager"),
        ("log C and A, float32, d = 512",),
    ),
    Chosen(
        "margin_softmax",
        r"margin_softmax, forward_backward, B = 1024, C = (100000|1000000)",
        ("scf_fast", "dense"),
        (
            "margin statistics, bfloat16, d = 512",
            "gradient of cosines, bfloat16, d = 512",
            "gradient of embeddings by product, bfloat16, d = 512",
            "gradient of class centers by product, bfloat16, d = 512",
        ),
    ),
    Chosen(
        "scoring",
        r"Eqn \(13\) of all pairs, 16384 x 16384",
        ("scf_fast", "scf_fast_top_10", "eager"),
        ("all pairs, matrix, float32, d = 512",),
    ),
    Chosen(
        "scoring",
        r"Eqn \(13\) of all pairs, 16384 x 16384",
        ("scf_fast_bf16",),
        ("all pairs, matrix, bfloat16, d = 512",),
    ),
    Chosen(
        "scoring",
        r"template pooling, .*",
        ("scf_fast",),
        ("pooling, kappa weights, float32, d = 512",),
    ),
)


def options_for(out: Path, tiny: bool) -> suite.Options:
    return suite.Options(out, tiny, _TINY_BUDGET if tiny else _BUDGET)


def machine_in(out: Path, tiny: bool) -> roofline.Machine:
    """Returns the device's rates, as the first part left them; measured anew where it left none."""
    path = out / f"{suite.FLOORS}.json"
    if not path.exists():
        suite.measure_floors(options_for(out, tiny))
    return roofline.Machine(**json.loads(path.read_text())["machine"])


def cases_of(section: str, tiny: bool) -> list[Case]:
    """Returns all cases of a section."""
    module, _, function = (suite.SECTIONS[section].cases or "").partition(":")
    return getattr(importlib.import_module(module), function)(DEVICE, tiny)


def kernel_cases(tiny: bool) -> Iterator[Case]:
    """Yields the chosen cases, ours of all sections before the others; tiny ones whatever their size."""
    ranked = []
    for number, chosen in enumerate(CHOSEN):
        for case in cases_of(chosen.section, tiny):
            if case.way in chosen.ways and (tiny or re.fullmatch(chosen.work, case.work)):
                ranked.append((chosen.ways.index(case.way), number, case))
    seen = set()
    for _, _, case in sorted(ranked, key=lambda entry: entry[:2]):
        if str(case) not in seen:
            seen.add(str(case))
            yield case


def measure_kernels(out: Path, tiny: bool) -> int:
    return int(suite.run_cases("kernels", kernel_cases(tiny), options_for(out, tiny), machine_in(out, tiny)))


def _count(work: str, architecture: int) -> dict[str, Any]:
    from bench.kernels.catalog import variants
    from bench.kernels.instructions import measure

    return measure(next(variant for variant in variants() if variant.work == work), architecture)


def predict(out: Path, tiny: bool) -> int:
    """Counts the instructions of the chosen kernels, compiled here and now, and writes what they allow at most."""
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    else:
        architecture = 90
    works = list(dict.fromkeys(work for chosen in CHOSEN for work in chosen.kernels))
    if tiny:
        works = ["pooling, kappa weights, float32, d = 512"]
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    content = {
        "section": "predictions",
        "environment": environment(DEVICE),
        "architecture": architecture,
        "records": records,
        "failures": failures,
    }
    processes = min(_PROCESSES, os.cpu_count() or 1, len(works))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(_count, work, architecture): work for work in works}
        for task in as_completed(tasks):
            try:
                records.append(task.result())
            except Exception as error:  # another Triton may name things otherwise; the others are still worth having
                failures.append(f"{tasks[task]}: {type(error).__name__}: {error}")
            write_json(out / "predictions.json", content)
    return int(bool(failures))


def _stage1_cases(ways: Iterable[str], tiny: bool) -> list[Case]:
    ways = list(ways)
    found = [
        case
        for case in cases_of("stage1", tiny)
        if case.way in ways
        and (tiny or (case.facts["network"], case.facts["batch"], case.facts["classes"]) == ("ir_100", 256, 85_742))
    ]
    return sorted(found, key=lambda case: ways.index(case.way))


def measure_stage1(out: Path, tiny: bool) -> int:
    cases = _stage1_cases(("scf_fast", "dense", "scf_fast, engine"), tiny)
    return int(suite.run_cases("stage1", cases, options_for(out, tiny), machine_in(out, tiny)))


def measure_stage1_compiled(out: Path, tiny: bool) -> int:
    cases = _stage1_cases(("scf_fast, compiled",), tiny)
    return int(suite.run_cases("stage1_compiled", cases, options_for(out, tiny), machine_in(out, tiny)))


def measure_stage2(out: Path, tiny: bool) -> int:
    from bench.first_gpu.stage2 import measure

    return measure(out, tiny)


def measure_engine(out: Path, tiny: bool) -> int:
    from bench.first_gpu.engine_steps import measure

    return measure(out, tiny)


WORKERS: dict[str, Callable[[Path, bool], int]] = {
    "kernels": measure_kernels,
    "predictions": predict,
    "stage2": measure_stage2,
    "stage1": measure_stage1,
    "stage1_compiled": measure_stage1_compiled,
    "engine": measure_engine,
}
