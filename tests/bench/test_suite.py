"""The suite at tiny sizes, in real processes too, and what remains of a section that is interrupted, wrong or out of
time.
"""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import suite
from bench.measuring.case import Case, NotMeasured, measure
from bench.measuring.roofline import Machine, Work

ROOT = Path(__file__).parents[2]
MACHINE = Machine(1e9, {"float32": 1e9, "bfloat16": 1e9}, 1e-6)


def ready():
    return torch.exp, [(torch.ones(8),)]


def failing(error):
    def prepare():
        raise error

    return prepare


def case(way="scf_fast", prepare=ready):
    return Case("exp, 8 values", way, prepare, Work(nbytes=64), (8, "values"), {"size": 8})


def test_a_record_has_samples_floor_memory_and_facts():
    record = measure(case(), "cpu", MACHINE, budget=0.001)
    seconds = record["seconds"]
    assert record["size"] == 8 and seconds["count"] >= 5 and seconds["low"] <= seconds["median"] <= seconds["high"]
    assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] == record["median_seconds"] <= seconds["max"]
    assert record["floor_seconds"] == 1e-6 and record["bound"] == "launch"
    assert record["times_floor"] == pytest.approx(record["median_seconds"] / 1e-6) and record[
        "per_second"
    ] == pytest.approx(8 / record["median_seconds"])
    assert record["peak_mib"] * 2**20 == 32


@pytest.mark.parametrize(
    "error, field, text",
    [
        (NotMeasured("too large"), "not_measured", "too large"),
        (torch.OutOfMemoryError("no\nmore"), "not_measured", "no"),
        (AssertionError("off"), "wrong", "off"),
        (RuntimeError("CUDA"), "failed", "RuntimeError: CUDA"),
    ],
)
def test_what_cannot_be_timed_says_why(error, field, text):
    record = measure(case(prepare=failing(error)), "cpu", MACHINE, budget=0.001)
    assert record[field] == text and "seconds" not in record


def options(folder, **more):
    return suite.Options(folder, tiny=True, budget=0.001, **more)


def test_an_interrupted_section_keeps_what_it_had(tmp_path):
    def cases():
        yield case("first")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.run_cases("made_up", cases(), options(tmp_path), MACHINE)
    content = json.loads((tmp_path / "made_up.json").read_text())
    assert [record["way"] for record in content["records"]] == ["first"] and content["complete"] is False


def test_a_wrong_result_fails_the_section_and_a_trace_is_kept(tmp_path):
    found = suite.run_cases(
        "made_up",
        [case(prepare=failing(AssertionError("off"))), case("after")],
        options(tmp_path, profile=tmp_path / "traces"),
        MACHINE,
    )
    content = json.loads((tmp_path / "made_up.json").read_text())
    assert found is True and content["complete"] is True and len(content["records"]) == 2
    assert "exp" in (tmp_path / "traces" / "made_up" / "exp,-8-values,-after.json").read_text()


def test_a_section_out_of_time_is_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.SECTIONS, "scf_loss", replace(suite.SECTIONS["scf_loss"], limit=0.1))
    assert suite.run_section("scf_loss", options(tmp_path)).status == "out of time"


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part", "torch.no_such_part"])
def test_a_section_that_needs_what_is_not_there_is_left_out(module, tmp_path, monkeypatch):
    monkeypatch.setitem(suite.SECTIONS, "scf_loss", replace(suite.SECTIONS["scf_loss"], needs=("json", module)))
    assert suite.run_section("scf_loss", options(tmp_path)).status == f"left out: needs {module}" and not list(
        tmp_path.iterdir()
    )


def test_every_section_says_what_it_runs():
    for name, section in suite.SECTIONS.items():
        assert section.limit < 480 and (section.commands is None or set(section.commands) == {"tiny", "cpu", "cuda"})
        assert (section.commands is None) == (section.cases is not None or name == suite.FLOORS)
        for words in (
            words for lists in (section.commands or {}).values() for words in lists if words[0].startswith("bench.")
        ):
            assert (ROOT / (words[0].replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize("name", [name for name, section in suite.SECTIONS.items() if section.cases])
def test_cases_of_a_gpu_have_floors_and_names_of_their_own(name):
    """A GPU's cases can be described without one; none is prepared here."""
    module, function = suite.SECTIONS[name].cases.split(":")
    cases = getattr(importlib.import_module(module), function)("cuda")
    h200 = Machine(4.3e12, {"float32": 60e12, "bfloat16": 788e12}, 5e-6)
    assert len(set(map(str, cases))) == len(cases) > 10
    assert all(5e-6 <= case.least.floor(h200)[0] < 2 for case in cases)
    assert all(
        any(case.way.startswith("scf_fast") for case in cases if case.work == work)
        for work in {case.work for case in cases}
    )


def check_section(folder, name):
    """A finished file that names its command and no place, and has all numbers of every case that was timed."""
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["complete"] and content["environment"]["command"].startswith(
        f"python -m bench.suite --sections {name}"
    )
    assert str(folder) not in json.dumps(content) and str(ROOT) not in json.dumps(content)
    measured = [record for record in content["records"] if "seconds" in record]
    assert name == "floors" or {"scf_fast"} <= {record["way"] for record in measured}
    assert all(record["times_floor"] > 0 and record["peak_mib"] >= 0 for record in measured)


def test_the_command_runs_sections_in_processes(tmp_path):
    """A section of cases and one that is a program; the floors come by themselves."""
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", str(tmp_path)]
    finished = subprocess.run(
        [*command, "--sections", "scf_loss,center_memory"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads((tmp_path / "suite.json").read_text())
    assert list(summary["sections"]) == ["floors", "scf_loss", "center_memory"]
    assert all(section["status"] == "ok" for section in summary["sections"].values())
    check_section(tmp_path, "floors")
    check_section(tmp_path, "scf_loss")
    assert json.loads((tmp_path / "center_memory-2000.json").read_text())["holds"]["no_logits"]


@pytest.mark.parametrize("name", ["objective_losses", "margin_softmax", "scoring"])
def test_sections_run_at_tiny_sizes(name, tmp_path):
    """Their cases run here, since a process for each would load everything again."""
    (tmp_path / "floors.json").write_text(json.dumps({"machine": MACHINE.as_dict()}))
    assert suite.run_worker(name, options(tmp_path)) == 0
    check_section(tmp_path, name)


def test_stage_1_goes_through_the_engine_in_a_process_of_its_own(tmp_path, fork_ranks):
    """That process has to leave the group that it has joined."""
    (tmp_path / "floors.json").write_text(json.dumps({"machine": MACHINE.as_dict()}))
    status, output = fork_ranks(
        0, "--worker", "stage1", "--tiny", "--budget", 0.001, "--out", tmp_path, module="bench.suite"
    )
    assert status == 0, output
    check_section(tmp_path, "stage1")
    records = json.loads((tmp_path / "stage1.json").read_text())["records"]
    assert [record["way"] for record in records if "seconds" in record] == ["dense", "scf_fast", "scf_fast, engine"]


@pytest.mark.parametrize(
    "words, gpu_only, message",
    [
        (["--sections", "stage3"], False, "must be some of floors"),
        (["--tiny"], False, "must be given with --out"),
        ([], True, "none was found"),
    ],
)
def test_bad_arguments(words, gpu_only, message, monkeypatch, capsys):
    monkeypatch.setattr(suite, "DEVICE", "cpu")
    assert suite.main(words, prog="python -m bench.gpu", gpu_only=gpu_only) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench.gpu: error: ") and message in error and error.count("\n") == 1
