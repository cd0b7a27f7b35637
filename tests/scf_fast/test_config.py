import dataclasses
from pathlib import Path

import pytest
import yaml

from scf_fast import command_line, config
from scf_fast.command_line import parse
from scf_fast.config import STAGES, BackboneConfig, ConfidenceConfig
from scf_fast.errors import InputError
from scf_fast.objectives import Objective
from scf_fast.train import main

STAGE1 = ["--stage", "backbone", "--data", "d", "--output_dir", "o"]
STAGE2 = ["--data", "d", "--output_dir", "o", "--saved_bkb", "b", "--saved_fc", "f"]


def fails(capsys, *arguments):
    """The one line that wrong arguments end with."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:  # from the parser itself
        status = stop.code
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_defaults_depend_on_the_stage_and_saved_bkb_implies_stage_2():
    stage1, stage2 = parse(STAGE1), parse(STAGE2)
    assert (stage1.stage, stage1.lr, stage1.lr_scheduler) == ("backbone", 0.1, "Polynomial")
    assert (stage2.stage, stage2.lr, stage2.lr_scheduler, stage2.batch_size, stage2.epochs) == (
        "confidence",
        3e-5,
        "StepLR",
        1024,
        30,
    )


def test_precedence_default_recipe_flag(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stage: backbone\nlr: 0.5\nepochs: 3\nmilestones: [1, 2]\nmargins: 1,0.3,0.2\n")
    c = parse(["--config", str(recipe), "--data", "d", "--output-dir", "o", "--lr", "0.25"])
    assert (c.lr, c.epochs, c.milestones, c.margins) == (0.25, 3, (1, 2), (1.0, 0.3, 0.2))


def test_margin_presets():
    assert parse([*STAGE1, "--loss", "cosface"]).margins == (1.0, 0.0, 0.4)
    assert parse([*STAGE1, "--margins", "1,0.1,0.2"]).margins == (1.0, 0.1, 0.2)


README = """--dataset ms1m --seed 777 --gpu_ids 0,1 --batch_size 1024 --output_dir OUT --saved_bkb B.pth
    --saved_fc F.pth --num_workers 8 --epochs 30 --lr 3e-5 --lr_scheduler StepLR --step_size 2 --gamma 0.5
    --convf_dim 25088 --z_dim 512 --radius 64 --max_grad_clip 0 --max_grad_norm 0 --tensorboard""".split()


def test_the_published_command_word_for_word():
    c = parse(README)
    assert (c.stage, c.data, c.dataroot, c.gpu_ids, c.cuda) == ("confidence", "list/ms1m_list.txt", ".", "0,1", True)
    assert (c.batch_size, c.epochs, c.lr, c.lr_scheduler, c.step_size, c.gamma, c.weight_decay) == (
        1024,
        30,
        3e-5,
        "StepLR",
        2,
        0.5,
        5e-4,
    )
    assert (c.convf_dim, c.z_dim, c.radius, c.max_grad_clip, c.max_grad_norm, c.tensorboard) == (
        25088,
        512,
        64.0,
        0.0,
        0.0,
        True,
    )
    assert c.published_checkpoints and c.normalizer == "exact" and not c.finetune_bkb
    c = parse(
        [
            *README,
            "--dataroot",
            "R",
            "--no_cuda",
            "--finetune_bkb",
            "--eval_batch_size",
            "1",
            "--no_tensorboard",
            "--no-published-checkpoints",
            "--num_workers",
            "0",
        ]
    )
    assert (c.data, c.dataroot, c.cuda, c.finetune_bkb, c.eval_batch_size, c.num_workers) == (
        "R/list/ms1m_list.txt",
        "R",
        False,
        True,
        1,
        0,
    )
    assert not c.tensorboard and not c.published_checkpoints
    assert parse([*README, "--data", "own.rec"]).data == "own.rec"
    assert not parse(STAGE2).published_checkpoints and parse([*STAGE2, "--published_checkpoints"]).published_checkpoints


def test_network_names_of_insightface_and_pixels_of_each_family():
    assert parse([*STAGE1, "--network", "r50"]).network == "iresnet50"
    for network, pixels in (("ir_100", "published"), ("iresnet100", "insightface"), ("tface_ir_101", "insightface")):
        assert parse([*STAGE1, "--network", network]).normalization == pixels
        assert parse([*STAGE1, "--network", network, "--normalization", "published"]).normalization == "published"
    assert parse(STAGE2).normalization is None  # known when --saved_bkb and --saved_fc have been read


def test_zero_divides_where_there_is_something_to_divide():
    for stage, several in ((STAGE1, 1), (STAGE2, 2)):
        assert [parse(stage).zero_stage_on(ranks) for ranks in (1, 2, 8)] == [0, several, several]
        assert parse([*stage, "--offload_optimizer", "cpu"]).zero_stage_on(1) == several
        assert parse([*stage, "--zero_stage", "3"]).zero_stage_on(1) == 3


PAIRS = ["--data", "d", "--output_dir", "o", "--saved_bkb", "b", "--objective"]  # they need no class centers


def test_batches_follow_the_objective():
    c = parse(STAGE2)
    assert (c.objective, c.objectives, c.pair_batch, c.batch_size) == (("scf",), (Objective.SCF,), None, 1024)
    for objective in ("pfe", "pfe_vmf", "pfe_vmf,pfe"):
        c = parse([*PAIRS, objective])
        assert c.is_pairwise and (c.pair_batch, c.batch_size, c.saved_fc) == ((64, 4), 256, None)
    assert c.objective == ("pfe", "pfe_vmf")  # whichever order they are given in
    assert parse([*PAIRS, "pfe", "--pair_batch", "12,5"]).batch_size == 60
    c = parse([*PAIRS, "pfe", "--pair_batch", "12,5", "--batch_size", "60"])
    assert dataclasses.replace(c, normalization="published").batch_size == 60
    assert not parse([*README, "--objective", "scf_gaussian"]).published_checkpoints


def test_outputs_of_a_net_follow_density_and_variance():
    c = parse([*STAGE2, "--objective", "scf,scf_gaussian", "--variance", "diagonal"])
    assert [c.outputs(objective, 512) for objective in c.objectives] == [1, 512]
    assert parse([*PAIRS, "pfe"]).outputs(Objective.PFE, 512) == 1


def test_a_run_without_the_objective_is_scf():
    """What _check_same_run takes for the options that an older version did not have."""
    defaults, now = ConfidenceConfig.defaults(), parse(STAGE2).identity()
    for name in ("objective", "variance", "pair_batch", "update_rule"):
        assert name in now and defaults[name] == now[name]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([*STAGE2, "--objective", "arcface"], "--objective must be one of scf, scf_gaussian, pfe, pfe_vmf, or several"),
        ([*STAGE2, "--objective", "scf,scf"], "or several of them with commas between, got scf,scf"),
        ([*STAGE2, "--objective", ""], "with commas between, got none"),
        ([*STAGE2, "--objective", "scf,pfe"], "train on other batches than pfe and pfe_vmf"),
        ([*STAGE2, "--variance", "diagonal"], "--variance must be scalar with --objective scf: a von Mises-Fisher"),
        ([*PAIRS, "pfe_vmf", "--variance", "diagonal"], "--variance must be scalar with --objective pfe_vmf"),
        ([*STAGE2, "--pair_batch", "64,4"], "--pair_batch must be left out with --objective scf"),
        ([*PAIRS, "pfe", "--pair_batch", "64"], "--pair_batch must be P,K, at least two people and two images"),
        ([*PAIRS, "pfe", "--pair_batch", "64,1"], "and two images of each, as in 64,4, got 64,1"),
        ([*PAIRS, "pfe", "--batch_size", "512"], "--batch_size must be left out, or the 256 of --pair_batch 64,4"),
        ([*PAIRS, "pfe", "--images_per_identity", "4"], "--images_per_identity cannot be given with --objective pfe"),
        ([*PAIRS, "pfe", "--max_images_per_identity", "4"], "--max_images_per_identity cannot be given with"),
        ([*PAIRS, "pfe", "--data_weights", "1,2"], "--data_weights cannot be given with --objective pfe"),
        ([*PAIRS, "pfe", "--shuffle", "block"], "--shuffle cannot be given with --objective pfe"),
        ([*PAIRS, "pfe", "--normalizer", "published"], "--normalizer must be exact with --objective pfe"),
        ([*PAIRS, "scf_gaussian"], "--saved_fc must be given for stage 2"),
        ([*PAIRS, "pfe", "--published_checkpoints"], "--published_checkpoints must be off but for --objective scf"),
        (
            [*STAGE2, "--update_rule", "sgd", "--published_checkpoints"],
            "must be off but for --objective scf alone, with",
        ),
        ([*PAIRS, "pfe,pfe_vmf", "--finetune_bkb"], "--objective pfe,pfe_vmf: --finetune_bkb would couple"),
        ([*PAIRS, "pfe,pfe_vmf", "--max_grad_norm", "1"], "--max_grad_norm 1.0 would couple the confidence nets"),
        ([*PAIRS, "pfe,pfe_vmf", "--lr_scheduler", "ReduceLROnPlateau"], "ReduceLROnPlateau would couple"),
    ],
)
def test_options_that_do_not_fit_the_objective(capsys, arguments, expected):
    assert expected in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([*STAGE2, "--gpu_ids", "all"], "--gpu_ids must be numbers with commas between, got 'all'"),
        ([*STAGE2, "--finetune_bkb", "--feature_cache", "c"], "--finetune_bkb must be without --feature_cache"),
        ([*STAGE1, "--finetune_bkb"], "--finetune_bkb belongs to stage confidence"),
        ([*STAGE1, "--epoch", "3"], "unknown argument --epoch; did you mean --epochs?"),
        ([*STAGE1, "--lr", "fast"], "lr must be float, got 'fast'"),
        ([*STAGE1, "--batch_size", "1.5"], "batch_size must be int, got '1.5'"),
        ([*STAGE1, "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        ([*STAGE1, "--network", "ir_34"], "--network must be one of ir_50"),
        ([*STAGE1, "--margins", "1,2"], "three numbers m1,m2,m3"),
        ([*STAGE1, "--radius", "32"], "--radius belongs to stage confidence"),
        ([*STAGE1, "--resume", "--overwrite"], "one continues the old run, the other deletes it"),
        (
            [*STAGE1, "--offload_optimizer", "cpu", "--zero_stage", "0"],
            "--offload_optimizer must be none with --zero_stage 0",
        ),
        (["--data", "d", "--output_dir", "o"], "--stage must be one of backbone, confidence, got None"),
        (
            [*STAGE1, "--images_per_identity", "2", "--data_weights", "1,2"],
            "only one of them can say what an epoch holds",
        ),
        ([*STAGE2, "--augmentation", "strong", "--feature_cache", "c"], "the cache holds one picture an image"),
        (["--stage", "backbone", "--output_dir", "o"], "--data must be given (or --dataset"),
        (["--stage", "confidence", "--data", "d", "--output_dir", "o"], "--saved_bkb must be given"),
        ([*STAGE2, "--momentum", "0.5"], "--momentum belongs to stage backbone"),
        ([*STAGE1, "--config", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, arguments, expected):
    assert expected in fails(capsys, *arguments)


ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(8)) + "lr: *a7"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("learning_rate: 1", "unknown key 'learning_rate'"),
        ("lr: [1", "is no valid YAML"),
        ("- 1", "must hold `key: value` lines"),
        ("epochs: many", "epochs must be int, got 'many'"),
        ("resume: 3", "resume must be true or false, got 3"),
        ("epochs: true", "epochs must be int, got True"),
        ("lr: yes", "lr must be float, got True"),
        ("milestones: [true, 2]", "milestones must be comma-separated ints, got [True, 2]"),
        ("data: [a, b]", "data must be text, several names in it with commas between, got ['a', 'b']"),
        ("epochs: 3\nlr: 1\nepochs: 5", "line 3: key 'epochs' is there twice"),
        pytest.param("epochs: " + "[" * 5000, "nested deeper than 20 levels", id="nested"),
        ("epochs: &a [*a]", "a value contains itself"),
        pytest.param(ALIASES, "line 5: holds more than 10000 values", id="aliases"),
        pytest.param("data: " + "x" * (1 << 20), "more than 1 MiB", id="large"),
    ],
)
def test_bad_recipe_is_one_clear_line(tmp_path, capsys, text, expected):
    (tmp_path / "r.yaml").write_text(text)
    assert expected in fails(capsys, *STAGE1, "--config", str(tmp_path / "r.yaml"))


def test_a_key_without_a_value_has_its_default_and_a_long_value_is_cut(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("epochs:\nlr: null\n")
    assert parse([*STAGE1, "--config", str(tmp_path / "r.yaml")]) == parse(STAGE1)
    (tmp_path / "r.yaml").write_text(f"epochs: {['x' * 100] * 900}\n")
    assert len(fails(capsys, *STAGE1, "--config", str(tmp_path / "r.yaml"))) < 600
    (tmp_path / "r.yaml").write_text("stage: [backbone]\n")
    assert "got ['backbone']" in fails(capsys, "--data", "x", "--config", str(tmp_path / "r.yaml"))


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in (field for config_class in STAGES.values() for field in dataclasses.fields(config_class)):
        assert f"--{field.name}" in text
    assert "0.1 (backbone), 3e-05 (confidence)" in text.replace("\n", " ").replace("  ", " ")


def test_launcher_rank_is_accepted():
    assert parse([*STAGE1, "--local_rank=1"]).stage == "backbone"


def test_saved_configuration_reads_back(tmp_path):
    c = parse(STAGE1)
    config.save(c, tmp_path / "config.yaml", {"torch": "x"})
    assert config.load_saved(tmp_path / "config.yaml") == c.as_dict()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["versions"] == {"torch": "x"}
    saved = {name: value for name, value in c.as_dict().items() if name != "stage"}
    assert BackboneConfig(**{**saved, "margins": tuple(c.margins), "milestones": (), "data_weights": ()}) == c


@pytest.mark.parametrize(
    "content, expected",
    [
        ("config: [1]", "no options"),
        ("config: 3", "no options"),
        ("[]", "TypeError"),
        ("config: {data: [a]}", "without data"),
        ("config: {data: a, stage: [backbone]}", "no such stage"),
        ("config: {data: a, stage: other}", "no such stage"),
        ("config: {data: a, dataroot: [b]}", "dataroot is of another type"),
        ("config: {data: a, epochs: true}", "epochs is of another type"),
        ("config: {data: a, milestones: 3}", "milestones is of another type"),
        pytest.param("config: " + "[" * 5000 + "]" * 5000, "ComposerError", id="nested"),
        pytest.param(ALIASES, "ComposerError", id="aliases"),
    ],
)
def test_a_configuration_of_another_shape_is_one_line(tmp_path, content, expected):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(
        InputError, match=rf"is no saved configuration \({expected}.*--overwrite starts over$"
    ) as raised:
        config.load_saved(tmp_path / "config.yaml")
    assert len(str(raised.value)) < 500


def test_a_configuration_with_another_digit_is_refused_unless_somebody_has_written_it(tmp_path):
    """`validation` decides whom `scf_fast.calibrate` takes for people held out."""
    path = tmp_path / "config.yaml"
    c = parse([*STAGE2, "--validation", "0.25"])
    config.save(c, path, {})
    assert config.load_saved(path) == c.as_dict()
    path.write_text(path.read_text().replace("validation: 0.25", "validation: 0.35"))
    with pytest.raises(InputError, match="than were written: damaged, or, if you have changed it, delete its crc32"):
        config.load_saved(path)
    path.write_text("".join(line for line in path.open() if not line.startswith("crc32")))
    assert config.load_saved(path)["validation"] == 0.35


RECIPES = sorted(path.stem for path in Path(command_line.__file__).with_name("recipes").glob("*.yaml"))
assert len(RECIPES) >= 6  # or the test below would try nothing


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_valid(name):
    values = command_line.load_recipe(f"scf_fast/recipes/{name}.yaml")
    extra = {"saved_bkb": "b", "saved_fc": "f"} if values["stage"] == "confidence" else {}
    c = command_line.make_config({"data": "d", "output_dir": "o", **values, **extra})
    assert c.stage == values["stage"] and type(c) is STAGES[c.stage]


@pytest.mark.parametrize(
    "name, network, margins, batch_size, lr, weight_decay, warmup_epochs",
    [
        ("ms1mv3_r50", "iresnet50", (1.0, 0.5, 0.0), 1024, 0.1, 5e-4, 0),
        ("ms1mv3_r100", "iresnet100", (1.0, 0.5, 0.0), 1024, 0.1, 5e-4, 0),
        ("glint360k_r100", "iresnet100", (1.0, 0.0, 0.4), 1024, 0.1, 1e-4, 0),
        ("wf42m_r100", "iresnet100", (1.0, 0.0, 0.4), 4096, 0.4, 5e-4, 2),
    ],
)
def test_recipes_have_the_settings_of_insightface(name, network, margins, batch_size, lr, weight_decay, warmup_epochs):
    values = command_line.load_recipe(f"scf_fast/recipes/{name}.yaml")
    c = command_line.make_config({"data": "d", "output_dir": "o", **values})
    assert (c.network, c.margins, c.batch_size, c.lr, c.weight_decay, c.warmup_epochs) == (
        network,
        margins,
        batch_size,
        lr,
        weight_decay,
        warmup_epochs,
    )
    assert (c.margin_gradient, c.scale, c.epochs, c.lr_scheduler, c.power, c.momentum) == (
        "straight_through",
        64.0,
        20,
        "Polynomial",
        1.0,
        0.9,
    )
    assert (c.normalization, c.dropout, c.max_grad_norm, c.z_dim) == ("insightface", 0.0, 5.0, 512)
    assert c.sample_rate == (0.2 if name == "wf42m_r100" else 1.0)


def test_start_slope_and_limit_follow_the_normalizer():
    config = parse(STAGE2)
    assert (config.initial_kappa, config.start, config.slope, config.max_first_step) == ("auto", None, "bounded", 4.0)
    config = parse([*STAGE2, "--normalizer", "published"])
    assert (config.initial_kappa, config.start, config.slope, config.max_first_step) == ("none", None, "exact", 0.0)
    config = parse([*STAGE2, "--initial_kappa", "1e2", "--slope", "exact", "--max_first_step", "0"])
    assert (config.start, config.slope, config.max_first_step) == (100.0, "exact", 0.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--initial_kappa", "0"], "--initial_kappa must be auto, none, or a number between 0 and 1e.08, got '0'"),
        (["--initial_kappa", "1e8"], "--initial_kappa must be auto, none, or a number"),
        (["--initial_kappa", "much"], "--initial_kappa must be auto, none, or a number"),
        (["--initial_kappa", "nan"], "--initial_kappa must be auto, none, or a number"),
        (["--max_first_step", "-1"], "--max_first_step must be 0 or more, got -1.0"),
        (["--normalizer", "published", "--slope", "bounded"], "--slope must be exact with --normalizer published"),
        (["--lr", "0"], "--lr must be positive, got 0.0"),
    ],
)
def test_starts_that_cannot_be(flags, message):
    with pytest.raises(InputError, match=message):
        parse([*STAGE2, *flags])
