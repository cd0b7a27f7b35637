"""One command from backbone to table: which runs it plans, with which flags, and what it repeats."""

import json
import sys

import pytest
import torch

from scf_fast import command_line, table
from scf_fast.objectives import Objective
from scf_fast.steps import Step, run_steps

GIVEN = ["--data", "d", "--saved_bkb", "b.pth", "--saved_fc", "fc.pth"]
SCF, SCF_G, PFE, PFE_V = Objective


@pytest.fixture
def plan(tmp_path):
    """Returns the steps of a command line on some GPUs."""

    def make(devices, *flags):
        planned = table.plan([*GIVEN, "--out", str(tmp_path), *flags])
        return planned.steps(devices)

    return make


def values(step):
    """The configuration that a training step starts train.py with."""
    words = step.arguments
    return command_line.parse(words)


def test_one_device_trains_twice_and_reads_each_batch_once_for_two(plan, tmp_path):
    first, second, evaluation = plan([], "--eval", "IJBB", "IJBC", "--epochs", "3", "--cache_dtype", "fp16")
    centers, pairs = values(first), values(second)
    assert centers.objective == ("scf", "scf_gaussian") and pairs.objective == ("pfe", "pfe_vmf")
    for config in centers, pairs:
        assert config.feature_cache == str(tmp_path / "feature_cache") and config.resume
        assert config.epochs == 3 and config.cache_dtype == "fp16" and config.saved_fc == "fc.pth"
    assert [centers.output_dir, pairs.output_dir] == [str(tmp_path / "scf+scf_gaussian"), str(tmp_path / "pfe+pfe_vmf")]
    assert first.command()[:3] == [sys.executable, "-m", "scf_fast.train"]
    models = [str(tmp_path / "scf+scf_gaussian" / name) for name in ("scf", "scf_gaussian")]
    models += [str(tmp_path / "pfe+pfe_vmf" / name) for name in ("pfe", "pfe_vmf")]
    assert evaluation.command()[2:] == [
        "scf_fast.evaluation",
        *("table", "--data", "IJBB", "IJBC", "--backbone", "backbone=b.pth", "--models", *models),
        *("--out", str(tmp_path / "table"), "--overwrite"),
    ]


def test_four_gpus_train_four_at_a_time_from_a_cache_that_is_there(plan, tmp_path):
    features, runs = plan([0, 1, 2, 3])
    assert features.command()[2] == "deepspeed.launcher.runner"
    assert features.command()[-len(features.arguments) - 1] == "scf_fast.feature_cache"
    assert features.arguments[:2] == ["build", str(tmp_path / "feature_cache")]
    assert [values(run).objective for run in runs] == [("scf",), ("scf_gaussian",), ("pfe",), ("pfe_vmf",)]
    assert [run.environment["CUDA_VISIBLE_DEVICES"] for run in runs] == ["0", "1", "2", "3"]
    assert [values(run).output_dir for run in runs] == [str(tmp_path / objective.value) for objective in Objective]


def test_more_gpus_are_divided_among_the_runs(plan):
    _, runs = plan([*range(4, 12)])
    words = [run.command() for run in runs]
    assert [word[word.index("--include") + 1] for word in words] == [
        f"localhost:{4 + 2 * i},{5 + 2 * i}" for i in range(4)
    ]
    _, runs = plan([0, 1])
    assert [values(run).objective for run in runs] == [("scf", "scf_gaussian"), ("pfe", "pfe_vmf")]


def test_a_folder_goes_on_with_the_runs_that_it_was_begun_with(plan, tmp_path):
    (tmp_path / "scf").mkdir()
    runs = plan([])
    assert [values(run).objective for run in runs] == [("scf",), ("scf_gaussian",), ("pfe",), ("pfe_vmf",)]
    (tmp_path / "scf").rename(tmp_path / "scf+scf_gaussian")
    assert len(plan([0, 1, 2, 3])[1]) == 2


def test_flags_go_to_the_runs_that_they_concern(plan, tmp_path):
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text("confidence_net: pfe\nupdate_rule: sgd\nlr: 1.0e-3\n")
    flags = ["--variance", "diagonal", "--pair_batch", "8,2", "--batch_size", "32", "--normalizer", "published"]
    _, (scf, scf_g, pfe, pfe_v) = plan([0, 1, 2, 3], *flags, "--pair_config", str(recipe))
    scf, scf_g, pfe, pfe_v = map(values, (scf, scf_g, pfe, pfe_v))
    assert [config.variance for config in (scf, scf_g, pfe, pfe_v)] == ["scalar", "diagonal", "diagonal", "scalar"]
    assert [config.batch_size for config in (scf, scf_g, pfe, pfe_v)] == [32, 32, 16, 16]
    assert [config.normalizer for config in (scf, scf_g, pfe)] == ["published", "exact", "exact"]
    assert [config.confidence_net for config in (scf, scf_g, pfe, pfe_v)] == ["mlp", "mlp", "pfe", "pfe"]
    assert scf.lr == 3e-5 and pfe.lr == 1e-3 and pfe.update_rule == "sgd"


def test_every_kind_of_option_survives_as_a_flag():
    given = {"flip": False, "cuda": True, "milestones": (3, 5), "lr": 1e-05, "normalization": None, "data_weights": ()}
    words = table.as_flags({"data": "a b,c", "saved_bkb": "x", "lr_scheduler": "MultiStep", **given})
    back = command_line.parse_values(words)
    kept = {name: value for name, value in given.items() if value not in (None, ())}
    assert back == {"data": "a b,c", "saved_bkb": "x", "lr_scheduler": "MultiStep", **kept}


def test_a_model_that_is_there_is_not_trained(tmp_path):
    planned = table.TablePlan(
        tmp_path, {"data": "d", "saved_bkb": "b", "saved_fc": "f"}, trained={SCF: "old"}, evaluation_data=["e"]
    )
    gaussian, pairs, evaluation = planned.steps([])
    assert values(gaussian).objective == ("scf_gaussian",) and values(pairs).objective == ("pfe", "pfe_vmf")
    models = evaluation.command()[evaluation.command().index("--models") + 1 :]
    assert models[:2] == ["old", str(tmp_path / "scf_gaussian")]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--objective", "scf"], "--objective cannot be given: the table has all of them"),
        (["--output_dir", "x"], "--output_dir cannot be given: --out is where everything goes"),
        (["--stage", "backbone"], "--stage must be confidence, or left out, got 'backbone'"),
        (["--lrr", "1"], "unknown argument --lrr; did you mean --lr?"),
        (["--images_per_identity", "4"], "--images_per_identity cannot be given with --objective pfe,pfe_vmf"),
        (["--finetune_bkb"], "--finetune_bkb must be without --feature_cache"),
        (["--with_published"], "the paper has cosface and arcface, got --name backbone"),
        (["--models", "nothing.pt"], "nothing.pt"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    assert table.main([*GIVEN, "--no_cuda", "--out", str(tmp_path / "out"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m scf_fast.table: error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert table.devices_for({}) == [5, 7] and table.devices_for({"cuda": False}) == []
    assert table.devices_for({"gpu_ids": "1, 3,6"}) == [1, 3, 6]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert table.devices_for({}) == [0, 1]


def python(name, code, arguments=None, **environment):
    return Step(name, name, lambda: [sys.executable, "-c", code], environment, arguments)


def test_steps_are_done_once_and_again_with_other_arguments(tmp_path, capfd):
    seconds = tmp_path / "seconds.json"
    log = tmp_path / "log"
    write = f"import os; open({str(log)!r}, 'a').write(os.environ['WORD'])"
    steps = [python("a", write, ["x"], WORD="a"), python("b", write, WORD="b")]
    status, done = run_steps(steps, seconds)
    assert status == 0 and done.keys() == {"a", "b"} == json.loads(seconds.read_text()).keys()
    steps = [python("a", write, ["x"], WORD="a"), python("b", write, WORD="b"), python("c", "raise SystemExit(3)")]
    assert run_steps(steps, seconds)[0] == 3 and log.read_text() == "ab"
    assert "== a: there already (" in capfd.readouterr().out
    assert run_steps([python("a", write, ["y"], WORD="a")], seconds)[0] == 0 and log.read_text() == "aba"


def test_steps_at_the_same_time_name_their_lines_and_end_together(tmp_path, capfd):
    meet = "import time, pathlib\np = pathlib.Path({!r})\n(p / '{}').touch()\n"
    meet += "while not (p / '{}').exists(): time.sleep(0.01)\nprint('met')"
    both = [python("a", meet.format(str(tmp_path), "x", "y")), python("b", meet.format(str(tmp_path), "y", "x"))]
    assert run_steps([both], tmp_path / "seconds.json")[0] == 0
    assert {"[a] met", "[b] met"} <= set(capfd.readouterr().out.splitlines())
    waits = python("waits", "import time; time.sleep(600)")
    status, done = run_steps([[waits, python("fails", "raise SystemExit(4)")]], tmp_path / "seconds.json")
    assert status == 4 and done.keys() == {"a", "b"}
