"""Every command that the documents name runs under that name, and hands over to the code in its room."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    path.stem
    for path in (ROOT / "bench").glob("*.py")
    if not path.stem.startswith("bench_") and path.stem not in ("__init__", "conftest", "gpu", "first_gpu")
}
CASES = {path.stem for path in (ROOT / "bench").glob("bench_*.py")}
ROOMS = ("kernels", "training", "input", "scoring", "robustness")
OWN = {"suite", "compare", "report"}  # at the top themselves


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_knows_its_name(name, capsys):
    door = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as ended:
        door.main(["--help"])
    assert ended.value.code == 0 and f"usage: python -m bench.{name} " in capsys.readouterr().out
    assert name in OWN or door.main.__module__.split(".")[1] in ROOMS


@pytest.mark.parametrize("name", sorted(CASES))
def test_cases_are_those_of_a_room(name):
    door = importlib.import_module(f"bench.{name}")
    (test,) = (getattr(door, handed_on) for handed_on in door.__all__)
    assert test.__name__ == name.replace("bench_", "test_") and test.__module__.split(".")[1] in ROOMS


def test_documented_commands_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md"), ROOT / "Makefile"]
    named = {name for page in pages for name in re.findall(r"-m bench\.(\w+)", page.read_text())}
    places = [(ROOT / "bench" / f"{name}.py", ROOT / "bench" / name / "__main__.py") for name in named]
    assert len(named) > 10 and all(any(path.exists() for path in place) for place in places)


def test_benchmarks_run_when_named(tmp_path):
    """One small case of each file; naming it makes pytest import the file and work out all of its cases."""
    results = tmp_path / "results.json"
    cases = [
        "bench/bench_log_bessel.py::test_log_bessel[log_bessel_i,-value,-1024-values,-eager]",
        "bench/bench_scf_loss.py::test_scf_loss[scf_loss,-forward-(confidence),-B-=-256,-C-=-85742,-eager]",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases, f"--benchmark-json={results}"]
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")
    }  # or pytest-benchmark times nothing
    environ["CUDA_VISIBLE_DEVICES"] = ""  # the cases are those of the CPU
    finished = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    timed = json.loads(results.read_text())["benchmarks"]
    assert {case["group"].split(",")[0] for case in timed} == {"log_bessel_i", "scf_loss"}
    for case in timed:
        assert "data" not in case["stats"] and case["stats"]["q1"] <= case["stats"]["median"] <= case["stats"]["q3"]
        assert {
            "device",
            "driver",
            "torch",
            "triton",
            "commit",
            "command",
            "dtype",
            "peak_mib",
            "kernels",
            "floor_seconds",
        } <= set(case["extra_info"])
