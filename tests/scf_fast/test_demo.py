"""The demo's steps fit together: the table is made from what stage 2 leaves."""

import json
import sys

import pytest

from scf_fast import command_line, demo
from scf_fast.steps import Step


@pytest.fixture
def steps(tmp_path):
    return {step.name: step for step in demo.make_steps(tmp_path / "data", tmp_path / "out")}


def after(words, flag):
    return words[words.index(flag) + 1]


def test_the_table_comes_after_everything_else(steps):
    assert list(steps) == ["data", "stage1", "stage2", "evaluation", "scf+scf_gaussian", "pfe+pfe_vmf", "table"]


def test_all_objectives_train_from_the_cache_that_stage_2_writes(steps, tmp_path):
    words = steps["stage2"].command()
    stage2 = command_line.parse(words[words.index("--module") + 2 :])
    assert stage2.objective == ("scf",) and stage2.feature_cache == str(tmp_path / "out" / "feature_cache")
    for name in "scf+scf_gaussian", "pfe+pfe_vmf":
        config = command_line.parse(steps[name].arguments)
        assert (config.feature_cache, config.cache_dtype) == (stage2.feature_cache, stage2.cache_dtype)
        assert (config.data, config.saved_bkb, config.saved_fc) == (stage2.data, stage2.saved_bkb, stage2.saved_fc)
        assert config.objective == tuple(name.split("+")) and config.confidence_net == "conv"
        assert config.batch_size == stage2.batch_size == 256


def test_the_table_is_of_the_four_models_on_the_demos_data(steps, tmp_path):
    words, out = steps["table"].command(), tmp_path / "out"
    assert words[2:4] == ["scf_fast.evaluation", "table"] and after(words, "--data") == str(tmp_path / "data")
    assert after(words, "--backbone") == f"cosface={out / 'backbone' / 'backbone.pth'}"
    models = words[words.index("--models") + 1 : words.index("--out")]
    assert models == [
        str(out / "systems" / run / name)
        for run, names in (("scf+scf_gaussian", ["scf", "scf_gaussian"]), ("pfe+pfe_vmf", ["pfe", "pfe_vmf"]))
        for name in names
    ]
    assert after(words, "--out") == str(out / "systems" / "table")


def test_results_have_the_seconds_of_all_steps_and_the_table(tmp_path, monkeypatch, capfd):
    report, table = tmp_path / "out" / "report", tmp_path / "out" / "systems" / "table"
    for folder in report, table:
        folder.mkdir(parents=True)
    (report / "results.json").write_text(json.dumps({"kappa": 1, "seconds": {"evaluation": 0.5}}))
    (table / "table.json").write_text(json.dumps({"templates": {}}))
    steps = [Step(name, name, lambda: [sys.executable, "-c", ""]) for name in ("evaluation", "table")]
    monkeypatch.setattr(demo, "make_steps", lambda *arguments: steps)
    for _ in range(2):
        assert demo.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    results = json.loads((report / "results.json").read_text())
    assert results["kappa"] == 1 and results["tables"] == {"templates": {}}
    seconds = json.loads((tmp_path / "out" / "seconds.json").read_text())
    assert results["seconds"] == {**seconds, "total": sum(seconds.values())} and seconds.keys() == {
        "evaluation",
        "table",
    }
    assert capfd.readouterr().out.count("there already") == 2


def test_a_step_that_fails_ends_the_demo(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    steps = [Step("data", "data", lambda: [sys.executable, "-c", "raise SystemExit(7)"])]
    monkeypatch.setattr(demo, "make_steps", lambda *arguments: steps)
    assert demo.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 7
