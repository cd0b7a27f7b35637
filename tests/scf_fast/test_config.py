import dataclasses

import pytest
import yaml

from scf_fast import config
from scf_fast.config import Config, parse

STAGE1 = ["--stage", "backbone", "--data", "d", "--output_dir", "o"]
STAGE2 = ["--data", "d", "--output_dir", "o", "--saved_bkb", "b", "--saved_fc", "f"]


def fails(capsys, *arguments):
    """The one line that wrong arguments end with."""
    with pytest.raises(SystemExit) as stop:
        parse(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_defaults_depend_on_the_stage_and_saved_bkb_implies_stage_2():
    stage1, stage2 = parse(STAGE1), parse(STAGE2)
    assert (stage1.stage, stage1.lr, stage1.lr_scheduler) == ("backbone", 0.1, "Polynomial")
    assert (stage2.stage, stage2.lr, stage2.lr_scheduler, stage2.batch_size, stage2.epochs) == ("confidence", 3e-5, "StepLR", 1024, 30)


def test_precedence_default_recipe_flag(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stage: backbone\nlr: 0.5\nepochs: 3\nmilestones: [1, 2]\nmargins: 1,0.3,0.2\n")
    c = parse(["--config", str(recipe), "--data", "d", "--output-dir", "o", "--lr", "0.25"])
    assert (c.lr, c.epochs, c.milestones, c.margins) == (0.25, 3, (1, 2), (1.0, 0.3, 0.2))


def test_margin_presets():
    assert parse([*STAGE1, "--loss", "cosface"]).margins == (1.0, 0.0, 0.4)
    assert parse([*STAGE1, "--margins", "1,0.1,0.2"]).margins == (1.0, 0.1, 0.2)


@pytest.mark.parametrize("arguments, expected", [
    ([*STAGE1, "--epoch", "3"], "unknown argument --epoch; did you mean --epochs?"),
    ([*STAGE1, "--lr", "fast"], "lr must be float, got 'fast'"),
    ([*STAGE1, "--batch_size", "1.5"], "batch_size must be int, got '1.5'"),
    ([*STAGE1, "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    ([*STAGE1, "--network", "ir_34"], "--network must be one of ir_50"),
    ([*STAGE1, "--margins", "1,2"], "three numbers m1,m2,m3"),
    ([*STAGE1, "--radius", "32"], "--radius belongs to stage confidence"),
    ([*STAGE1, "--resume", "--overwrite"], "one continues the old run, the other deletes it"),
    ([*STAGE1, "--precision", "fp16"], "Use bf16, or --zero_stage 0"),
    (["--data", "d", "--output_dir", "o"], "--stage must be one of backbone, confidence, got None"),
    (["--stage", "backbone", "--output_dir", "o"], "--data must be given"),
    (["--stage", "confidence", "--data", "d", "--output_dir", "o"], "--saved_bkb must be given"),
    ([*STAGE2, "--momentum", "0.5"], "--momentum belongs to stage backbone"),
    ([*STAGE1, "--config", "missing.yaml"], "missing.yaml: cannot be read"),
])
def test_bad_input_is_one_clear_line(capsys, arguments, expected):
    assert expected in fails(capsys, *arguments)


@pytest.mark.parametrize("text, expected", [
    ("learning_rate: 1", "unknown key 'learning_rate'"), ("lr: [1", "is no valid YAML"), ("- 1", "must hold `key: value` lines"),
    ("epochs: many", "epochs must be int, got 'many'"), ("resume: 3", "resume must be true or false, got 3")])
def test_bad_recipe_is_one_clear_line(tmp_path, capsys, text, expected):
    (tmp_path / "r.yaml").write_text(text)
    assert expected in fails(capsys, *STAGE1, "--config", str(tmp_path / "r.yaml"))


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text
    assert "0.1 (backbone), 3e-05 (confidence)" in text.replace("\n", " ").replace("  ", " ")


def test_launcher_rank_is_accepted():
    assert parse([*STAGE1, "--local_rank=1"]).stage == "backbone"


def test_saved_configuration_reads_back(tmp_path):
    c = parse(STAGE1)
    config.save(c, tmp_path / "config.yaml", {"torch": "x"})
    assert config.load_saved(tmp_path / "config.yaml") == c.as_dict()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["versions"] == {"torch": "x"}
    assert Config(**{**c.as_dict(), "margins": tuple(c.margins), "milestones": ()}) == c


@pytest.mark.parametrize("name", ["demo_backbone", "demo_confidence"])
def test_shipped_recipes_are_valid(name):
    values = config.load_recipe(f"scf_fast/recipes/{name}.yaml")
    extra = {"saved_bkb": "b", "saved_fc": "f"} if values["stage"] == "confidence" else {}
    assert Config(data="d", output_dir="o", **values, **extra).stage == values["stage"]
