"""The plan for the first minutes on a GPU: limits hold, files survive, and it runs without DeepSpeed and DALI."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench.first_gpu import runner, workers
from bench.first_gpu.plan import PARTS, Part, Task
from bench.first_gpu.report import predicted_seconds, write_report

ROOT = Path(__file__).parents[3]


def part(*tasks, seconds=20, at_once=1):
    return Part("made_up", "nothing", seconds, lambda out, tiny: list(tasks), at_once)


def test_what_is_out_of_time_is_ended_with_its_children_and_the_next_part_runs(tmp_path):
    child = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('began', flush=True); time.sleep(60)"
    endless = Task(("timeit", "-n1", "-r1", child))
    began = time.monotonic()
    slow, never = runner.run_part(part(endless, Task(("json.tool", "--help"))), tmp_path, True, 1.5)
    assert time.monotonic() - began < 15
    assert (slow.status, never.status) == ("out of time", "out of time") and never.seconds == 0
    assert "began" in (tmp_path / f"{endless.name}.log").read_text()
    group = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert child not in group
    (quick,) = runner.run_part(part(Task(("json.tool", "--help"))), tmp_path, True, 20)
    assert quick.status == "ok"


def test_a_failure_and_a_missing_module_are_told_apart(tmp_path):
    failing, lacking = Task(("json.tool", str(tmp_path / "none"))), Task(("json.tool", "-h"), ("no_such_package.part",))
    outcomes = {outcome.status for outcome in runner.run_part(part(failing, lacking), tmp_path, True, 20)}
    assert outcomes == {"failed", "left out: needs no_such_package.part"}


def test_processes_of_a_part_run_at_the_same_time(tmp_path):
    naps = [Task(("timeit", "-n1", "-r1", f"import time; time.sleep(2 + 0 * {number})")) for number in range(3)]
    began = time.monotonic()
    outcomes = runner.run_part(part(*naps, at_once=3), tmp_path, True, 30)
    assert [outcome.status for outcome in outcomes] == ["ok"] * 3
    assert time.monotonic() - began < sum(outcome.seconds for outcome in outcomes)


def test_the_whole_plan_fits_nine_minutes():
    assert sum(part.seconds for part in PARTS) <= 9 * 60 + 30  # the last part has what is left
    assert [part.name for part in PARTS][:4] == ["floors", "correctness", "kernels", "stage2"]


def test_every_kernel_test_is_in_the_plan(tmp_path):
    words = [task.words for part in PARTS for task in part.tasks(tmp_path, False)]
    named = {Path(word).name for task in words for word in task if word.startswith("tests/kernels/")}
    assert named == {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}


def test_the_archive_holds_the_small_files_within_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_ARCHIVE_BYTES", 40_000)
    monkeypatch.setattr(runner, "_LOG_BYTES", 100)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.log").write_text("x" * 500 + "end")
    (tmp_path / "c.json").write_bytes(os.urandom(50_000))
    runner.write_archive(tmp_path)
    runner.write_archive(tmp_path)  # an earlier archive is not packed into the next
    with tarfile.open(tmp_path / runner.ARCHIVE) as archive:
        assert sorted(archive.getnames()) == ["a.json", "b.log"]
        log = archive.extractfile("b.log").read()
    assert len(log) == 100 and log.endswith(b"end") and (tmp_path / runner.ARCHIVE).stat().st_size < 40_000


def test_the_chosen_cases_and_kernels_exist(monkeypatch):
    from bench.kernels.catalog import variants

    monkeypatch.setattr(workers, "DEVICE", "cuda")  # cases are described for a GPU without having one
    known = {variant.work for variant in variants()}
    found = {str(case) for case in workers.kernel_cases(False)}
    for chosen in workers.CHOSEN:
        assert set(chosen.kernels) <= known
        for way in chosen.ways:
            assert any(
                workers.re.fullmatch(chosen.work, case.work) and case.way == way for case in workers.kernel_cases(False)
            ), (chosen, way)
    assert len(found) == len(list(workers.kernel_cases(False))) and 15 <= len(found) <= 30
    for ways in ("scf_fast", "dense", "scf_fast, engine"), ("scf_fast, compiled",):
        assert len(workers._stage1_cases(ways, False)) == len(ways)


def test_a_time_is_set_against_the_prediction(tmp_path):
    record = {
        "work": "Eqn (13) of all pairs, 16384 x 16384",
        "way": "scf_fast",
        "floor_seconds": 1e-3,
        "median_seconds": 4e-3,
        "times_floor": 4.0,
    }
    predictions = {"records": [{"work": "all pairs, matrix, float32, d = 512", "possible": {"H200": 0.5}}]}
    assert predicted_seconds(record, predictions, "H200") == pytest.approx(2e-3)
    assert predicted_seconds(record, predictions, None) is None
    assert predicted_seconds(record | {"way": "eager"}, predictions, "H200") is None
    assert (
        predicted_seconds(record | {"work": "Eqn (13) of all pairs, 16384 x 16384, half"}, predictions, "H200") is None
    )
    environment = {
        "device": "NVIDIA H200",
        "torch": "2.11",
        "cuda": "13.0",
        "triton": "3.6",
        "commit": "c",
        "date": "d",
    }
    outcome = {
        "command": "python -m pytest t",
        "status": "failed",
        "seconds": 1.0,
        "tests": {"tests": 2, "failures": 1},
    }
    for name, content in {
        "first_gpu": {"environment": environment, "tiny": False, "parts": {"correctness": [outcome], "stage1": []}},
        "predictions": predictions | {"failures": ["pooling: KeyError: x"]},
        "kernels": {"records": [record, {"work": "w", "way": "eager", "wrong": "off by one"}]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_report(tmp_path, tmp_path / "report.txt")
    text = (tmp_path / "report.txt").read_text()
    assert "2.00 !" in text and "wrong: off by one" in text and "not counted: pooling: KeyError: x" in text
    assert "correctness: failed: python -m pytest t 2 tests, 1 failures" in text
    assert "stage1: no time was left for it" in text


def test_without_deepspeed_and_dali(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('deepspeed', 'nvidia'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    out = tmp_path / "out"
    words = ["--tiny", "--out", str(out), "--parts", "floors,stage2,stage1,engine,leftovers"]
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MASTER_PORT")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_gpu", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: needs deepspeed" in done.stdout and "left out: needs nvidia.dali" in done.stdout
    records = {record["way"]: record for record in json.loads((out / "first_gpu_stage2.json").read_text())["records"]}
    assert list(records)[:2] == ["published", "cached"]
    for setting in ("tf32", "autocast", "through_backbone"):
        assert sum(record.get(setting, False) for record in records.values()) == 1
    assert records["published, TF32"]["tf32"] and records["published, autocast"]["autocast"]
    assert records["published, backward through the backbone"]["through_backbone"]
    (_, _, engine) = json.loads((out / "stage1.json").read_text())["records"]
    assert (engine["way"], engine["not_measured"]) == ("scf_fast, engine", "deepspeed is not installed")
    with tarfile.open(out / "first_gpu.tar.gz") as archive:
        assert {"first_gpu.json", "report.txt", "floors.json", "first_gpu_stage2.json"} <= set(archive.getnames())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--parts", "floors,none"], "--parts must be some of floors, correctness"),
        ([], "a CUDA device is needed, and none was found; --tiny"),
    ],
)
def test_errors(words, message, tmp_path, capsys):
    if not words and torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    assert runner.main(["--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
