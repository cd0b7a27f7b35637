"""The measuring itself: medians taken in turns, memory counted, and benchmark files that pytest can run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.kernels import log_bessel, scf_loss
from bench.measuring import timing
from bench.measuring.environment import environment
from bench.scoring import scoring

ROOT = Path(__file__).parents[3]


def test_interleaved_seconds_takes_turns(monkeypatch):
    called, timed = [], []
    ticks = iter([1.0, 10.0, 20.0, 2.0, 9.0, 30.0])  # rounds a b, b a, a b

    def fake_seconds(call, args, device, clock):
        timed.append(call(*args))
        return next(ticks)

    monkeypatch.setattr(timing, "_seconds", fake_seconds)
    calls = {name: lambda x, name=name: called.append(name + x) or name + x for name in "ab"}
    samples = timing.interleaved_seconds(calls, [("0",), ("1",), ("2",)], "cpu", rounds=3)
    assert timed == ["a0", "b0", "b2", "a2", "a1", "b1"]
    assert called[2:] == [
        "a2",
        "a0",
        "b2",
        "b0",
        "b1",
        "b2",
        "a1",
        "a2",
        "a0",
        "a1",
        "b0",
        "b1",
    ]  # each after one of its own, untimed
    assert samples == {"a": [1.0, 2.0, 9.0], "b": [10.0, 20.0, 30.0]}


def test_footprint_counts_memory_held_at_once():
    """Two temporaries of a MiB at once, then the result: 2 MiB, not the 3 MiB allocated in all."""
    x = torch.rand(2**18)
    found = timing.footprint(lambda x: x.exp().log().exp(), (x,), "cpu")
    assert found["peak_mib"] == pytest.approx(2.0, abs=0.01)
    assert found["operators"] == 3
    assert found["kernels"] is found["copies"] is found["device_us"] is None


def test_buffer_count_covers_the_cache_within_bounds():
    assert timing.buffer_count(4096) == 16
    assert timing.buffer_count(64 * 2**20) == 4
    assert timing.buffer_count(2**34) == 2


def test_environment_names_what_a_number_needs():
    found = environment("cpu")
    assert found["device"] == "cpu" and found["cpu"] and found["torch"] == torch.__version__
    assert {"driver", "triton", "commit", "date", "threads"} <= set(found)


@pytest.mark.parametrize("quantity", log_bessel.FAMILY)
def test_every_function_passes_its_check(quantity):
    """Compiled ones excepted, for the compiler's time: test_baselines has one of them."""
    torch.manual_seed(0)
    for name in log_bessel.FAMILY[quantity].keys() - {"compiled"}:
        log_bessel.check(quantity, name, log_bessel.fresh_kappas(64, "cpu")[0])


@pytest.mark.parametrize("quantity", log_bessel.FAMILY)
def test_a_wrong_function_is_not_timed(monkeypatch, quantity):
    torch.manual_seed(0)
    honest = log_bessel.FAMILY[quantity]["scf_fast"]
    monkeypatch.setitem(log_bessel.FAMILY[quantity], "scf_fast", lambda kappa: honest(1.001 * kappa))
    with pytest.raises(AssertionError):
        log_bessel.check(quantity, "scf_fast", log_bessel.fresh_kappas(64, "cpu")[0])


@pytest.mark.parametrize("name", ["scf_fast", "scf_fast_published", "published", "eager"])
def test_every_loss_passes_its_check(name):
    torch.manual_seed(0)
    class_centers = scf_loss.fresh_class_centers(100, "cpu")
    scf_loss.check(name, scf_loss.fresh_batches(32, class_centers, finetune=False)[0])


def test_a_wrong_loss_is_not_timed(monkeypatch):
    torch.manual_seed(0)
    class_centers = scf_loss.fresh_class_centers(100, "cpu")
    batch = scf_loss.fresh_batches(32, class_centers, finetune=False)[0]
    honest = scf_loss.LOSSES["published"]
    monkeypatch.setitem(scf_loss.LOSSES, "scf_fast", lambda *inputs: honest(*inputs))
    with pytest.raises(AssertionError):
        scf_loss.check("scf_fast", batch)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("scf_fast", lambda *faces: scoring.vmf_similarity_matrix(*faces) + 0.01),
        ("scf_fast_top_10", lambda *faces: (scoring.vmf_similarity_matrix(*faces).topk(11).values[:, 1:], None)),
        ("scf_fast_histogram", lambda *faces: scoring.histogram(*faces).roll(3, dims=1)),
    ],
)
def test_wrong_scores_are_not_timed(monkeypatch, name, wrong):
    torch.manual_seed(0)
    faces = (*scoring.fresh_faces(40, "cpu"), *scoring.fresh_faces(40, "cpu"))
    scoring.check(name, faces)
    monkeypatch.setitem(scoring.MATRICES if name == "scf_fast" else scoring.REDUCED, name, wrong)
    with pytest.raises(AssertionError):
        scoring.check(name, faces)


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


def test_samples_are_many_where_calls_are_short_and_few_where_they_are_long(monkeypatch):
    for seconds, count in ((1e-4, 200), (0.1, 10), (0.5, 5), (3.0, 3)):
        monkeypatch.setattr(timing, "_seconds", lambda *_, seconds=seconds: seconds)
        assert timing.sampled_seconds(lambda: None, [()], "cpu", budget=1.0) == [seconds] * count


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    timing.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        timing.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_command_names_no_place_on_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/else", "--out", "/home/me/runs", str(ROOT / "bench" / "results"), "--batch", "3"]
    )
    found = environment("cpu")["command"]
    assert (
        found.startswith("python ") and found.endswith(" --out runs bench/results --batch 3") and "/home" not in found
    )
