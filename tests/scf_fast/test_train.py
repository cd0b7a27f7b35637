"""Launches of train.py: both stages on two ranks, resume, plain python and torchrun, and bad input."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from scf_fast import distributed
from scf_fast.distributed import free_port
from scf_fast.model import SCF
from scf_fast.networks.backbones import Backbone
from scf_fast.run import folder_lock
from scf_fast.weights.family_names import identify_backbone
from scf_fast.weights.reading import read_weights

STEPS = 8 * 16 // 32 * 2


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder, key):
    return [m[key] for m in metrics(folder)]


def test_stage_1_on_two_ranks(stage1):
    folder, output = stage1
    assert losses(folder, "step") == list(range(1, STEPS + 1))
    assert all(0 < m["loss"] < 100 and 0 <= m["accuracy"] <= 1 and m["images_per_second"] > 0 for m in metrics(folder))
    state = read_weights(folder / "backbone.pth").require_backbone()
    assert identify_backbone(state) == ("ir_tiny", 32)
    assert all(v.dtype == torch.float32 for k, v in state.items() if "num_batches" not in k)
    assert read_weights(folder / "fc.pth").require_class_centers().shape == (8, 32)
    assert sorted(p.name for p in (folder / "checkpoints").glob("step*")) == ["step00000004", "step00000008"]
    assert (folder / "checkpoints" / "latest").read_text() == "step00000008"
    assert list((folder / "runs").glob("events.*"))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["config"]["network"] == "ir_tiny"
    assert saved["versions"]["torch"] == torch.__version__
    assert "2 ranks on" in output and "img/s" in output and "optimizer: fused SGD" in output
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] not in ("log", "progress")] == [
        "start",
        "checkpoint",
        "export",
        "checkpoint",
        "export",
        "done",
    ]
    assert events[-1]["counts"] == {
        "steps": STEPS,
        "skipped_not_finite": 0,
        "skipped_gradient_not_finite": 0,
        "skipped_by_loss_scale": 0,
        "broken_images": 0,
    }
    assert set(events[-1]["seconds"]) >= {"data", "forward", "backward", "optimizer"} and all(
        value > 0 for value in events[-1]["seconds"].values()
    )
    assert 0 < events[-1]["rates"]["communication"] <= 1
    assert "Traceback" not in output


def test_stage_2_on_two_ranks(stage1, stage2):
    folder, output = stage2
    for record in metrics(folder):
        total = record["neg_kappa_times_cos_theta"] + record["neg_dim_scalar_times_log_kappa"] + record["log_iv_kappa"]
        constant = 16 * torch.log(torch.tensor(2 * torch.pi)).item() + 32 * torch.log(torch.tensor(64.0)).item()
        assert record["total_loss"] == pytest.approx(total + constant, rel=1e-4)
        assert 0 < record["kappa_p05"] <= record["kappa_p50"] <= record["kappa_p95"]
    total, kappa = losses(folder, "total_loss"), losses(folder, "kappa")
    assert sum(total[STEPS // 2 :]) < sum(total[: STEPS // 2])  # an epoch's batches are all images
    assert kappa[-1] < kappa[0]
    model = SCF.from_checkpoint(folder)
    frozen = read_weights(stage1[0] / "backbone.pth").require_backbone()
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())
    assert set(torch.load(folder / "confidence.pth")) == {"uncer_net_state_dict", "objective", "epoch", "global_step"}
    assert "optimizer: fused Adam" in output


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_resume_continues_the_same_run(name, faces, stage1, flags, request, tmp_path, fork_ranks):
    """Stopped in the middle of an epoch and resumed: losses equal to the uninterrupted run's, bit for bit."""
    whole, _ = request.getfixturevalue(name)
    own = {
        "stage1": ["--zero_stage", 2],
        "stage2": ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth"],
    }[name]
    command = [*flags[name], *own, "--data", faces / "train", "--output_dir", tmp_path / "run"]
    status, output = fork_ranks(2, *command, "--max_steps", 3)
    assert status == 0, output
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 4, "loss": 0.0, "total_loss": 0.0}\n{"step": 5, "lo'
        )  # as of a run that died after its last checkpoint
    status, output = fork_ranks(2, *command, "--resume")
    assert status == 0 and "resumed at step 3" in output, output
    key = "loss" if name == "stage1" else "total_loss"
    assert losses(tmp_path / "run", key) == losses(whole, key)


def test_cached_stage_2_trains_the_same_and_computes_nothing_twice(faces, stage1, stage2, flags, tmp_path, fork_ranks):
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth", "--data", faces / "train"]
    command = [*flags["stage2"], *weights, "--feature_cache", tmp_path / "cache", "--cache_dtype", "fp32"]
    status, output = fork_ranks(2, *command, "--output_dir", tmp_path / "run")
    assert status == 0 and "frozen backbone: fp32 taken" in output, output
    assert losses(tmp_path / "run", "total_loss") == pytest.approx(losses(stage2[0], "total_loss"), rel=1e-4)
    status, output = fork_ranks(2, *command, "--output_dir", tmp_path / "again", "--zero_stage", 0)
    assert status == 0 and "frozen backbone" not in output, output  # all features came from the cache
    assert losses(tmp_path / "again", "total_loss") == pytest.approx(losses(stage2[0], "total_loss"), rel=1e-4)


@pytest.mark.parametrize("zero_stage, how", [(0, "python"), (1, "torchrun"), (3, "forked")])
def test_other_launchers_and_zero_stages_train_the_same(
    zero_stage, how, faces, stage1, flags, tmp_path, run_command, fork_ranks
):
    """One rank or two, ZeRO 0 to 3: BatchNorm sees other batches on one rank, so only the two-rank losses must agree
    closely. The deepspeed launcher runs the published command, in stages/test_published_files.py.
    """
    command = [*flags["stage1"], "--zero_stage", zero_stage, "--data", faces / "train"]
    command += ["--output_dir", tmp_path / "run"]
    before = set(os.listdir("/dev/shm"))
    if how == "python":
        status, output = run_command([sys.executable, "train.py", *command, "--profile"])
    elif how == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
        status, output = run_command([sys.executable, *torchrun, "train.py", *command])
    else:
        status, output = fork_ranks(2, *command)
    assert status == 0, output
    if how == "python":
        trace = json.loads((tmp_path / "run" / "profile" / "steps6-8_rank0.json").read_text())
        assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])
    assert set(os.listdir("/dev/shm")) <= before
    ours, theirs = losses(tmp_path / "run", "loss"), losses(stage1[0], "loss")
    assert ours == pytest.approx(theirs, rel=1e-3 if how != "python" else 0.2)
    ours, theirs = (read_weights(out / "backbone.pth").require_backbone() for out in (tmp_path / "run", stage1[0]))
    assert ours.keys() == theirs.keys()


def test_stage_1_goes_on_with_another_number_of_ranks(faces, stage1, flags, tmp_path, fork_ranks):
    """One rank and another ZeRO stage continue the run of two ranks: class centers, momentum, weights, BatchNorm and
    schedule.
    """
    shutil.copytree(stage1[0], tmp_path / "run")
    more = ["--zero_stage", 1, "--epochs", 3, "--data", faces / "train", "--output_dir", tmp_path / "run", "--resume"]
    status, output = fork_ranks(1, *flags["stage1"], *more)
    assert status == 0 and f"resumed at step {STEPS}" in output, output
    assert losses(tmp_path / "run", "step") == list(range(1, STEPS * 3 // 2 + 1))
    continued = losses(tmp_path / "run", "loss")
    assert max(continued[STEPS:]) < min(continued[: STEPS // 2])  # it has not started again


def test_stage_2_goes_on_with_another_number_of_ranks(faces, flags, tmp_path, fork_ranks):
    """Two ranks and ZeRO 2, then one and ZeRO 3, then two and ZeRO 0, each from the middle of an epoch: the losses are
    those of one launch. The network has no BatchNorm, and little to write at a checkpoint.
    """
    torch.manual_seed(0)
    torch.save(Backbone("ir_tiny", 32).state_dict(), tmp_path / "backbone.pth")
    torch.save({"arc_face_state_dict": {"weight": torch.randn(8, 32)}}, tmp_path / "fc.pth")
    weights = ["--saved_bkb", tmp_path / "backbone.pth", "--saved_fc", tmp_path / "fc.pth", "--data", faces / "train"]
    command = [*flags["stage2"], "--confidence_net", "mlp", "--lr", "1e-4", "--initial_kappa", "none"]
    command += [*weights, "--output_dir"]
    for ranks, more in (
        (2, ["--max_steps", 3]),
        (1, ["--max_steps", 5, "--zero_stage", 3]),
        (2, ["--zero_stage", 0]),
    ):
        status, output = fork_ranks(ranks, *command, tmp_path / "run", "--resume", *more)
        assert status == 0, output
    assert "resumed at step 5 (epoch 2), written by 1 ranks with ZeRO 3" in output
    status, output = fork_ranks(1, *command, tmp_path / "whole", "--zero_stage", 0)
    assert status == 0, output
    assert losses(tmp_path / "run", "step") == list(range(1, STEPS + 1))
    assert losses(tmp_path / "run", "total_loss") == pytest.approx(losses(tmp_path / "whole", "total_loss"), rel=1e-5)


def truncated(folder, tmp_path):
    copy = tmp_path / "cut"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.npy"))
    with open(copy / "train.rec", "r+b") as file:
        file.truncate(os.path.getsize(copy / "train.rec") - 1000)
    return copy


def mislabeled(folder, tmp_path):
    copy = tmp_path / "label"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.npy"))
    (copy / "property").write_text("5,112,112\n")
    return copy


BAD = {
    "missing data": (lambda f, s, t: ["--data", t / "none"], "there is no data set at"),
    "truncated rec": (lambda f, s, t: ["--data", truncated(f, t)], "train.rec"),
    "label out of range": (lambda f, s, t: ["--data", mislabeled(f, t)], "but"),
    "batch larger than the data": (
        lambda f, s, t: ["--data", f, "--batch_size", "512"],
        "--batch_size 512 is more than the 128 images",
    ),
    "accumulation does not divide": (
        lambda f, s, t: ["--data", f, "--gradient_accumulation_steps", "3"],
        "must be divisible by ranks",
    ),
    "unknown deepspeed key": (
        lambda f, s, t: ["--data", f, "--deepspeed_config", t / "ds.json"],
        "did you mean gradient_clipping?",
    ),
    "one image a BatchNorm": (
        lambda f, s, t: ["--data", f, "--batch_size", "8", "--gradient_accumulation_steps", "8"],
        "must be at least 16",
    ),
    "folder of something else": (
        lambda f, s, t: ["--data", f, "--output_dir", t],
        "holds files that are no run of this program",
    ),
    "a different run": (
        lambda f, s, t: ["--data", f, "--output_dir", s, "--seed", "5", "--resume"],
        "holds a different run (seed 777 -> 5)",
    ),
    "a run without resume": (lambda f, s, t: ["--data", f, "--output_dir", s], "give --resume to continue it"),
}


def test_a_second_run_in_the_same_folder_is_refused(faces, stage1, flags, monkeypatch, capsys):
    from scf_fast import train

    monkeypatch.setattr(folder_lock, "PATIENCE", 1)
    monkeypatch.setattr(
        sys,
        "argv",
        ["train.py", *map(str, [*flags["stage1"], "--data", faces / "train", "--output_dir", stage1[0], "--resume"])],
    )
    before = snapshot(stage1[0])
    with folder_lock.locked(stage1[0]):
        assert train.main() == 2
    message = capsys.readouterr().err
    assert f"another run is writing to it: process {os.getpid()} on " in message and "pkill" not in message
    assert snapshot(stage1[0]) == before


def test_a_damaged_cache_is_one_line(faces, stage1, flags, tmp_path, monkeypatch, capsys):
    from scf_fast import train

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "meta.json").write_text("{")
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth", "--data", faces / "train"]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *map(
                str,
                [
                    *flags["stage2"],
                    *weights,
                    "--zero_stage",
                    0,
                    "--feature_cache",
                    tmp_path / "cache",
                    "--output_dir",
                    tmp_path / "run",
                ],
            ),
        ],
    )
    try:
        assert train.main() == 2
    finally:
        distributed.finish()
    assert "meta.json is damaged" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_folder_that_cannot_be_made_is_one_line(faces, flags, monkeypatch, capsys):
    from scf_fast import train

    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *map(str, [*flags["stage1"], "--data", faces / "train", "--output_dir", "/proc/no_room_for_a_run"]),
        ],
    )
    try:
        assert train.main() == 2
    finally:
        distributed.finish()
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("train.py: error: ")
        and not Path("/proc/no_room_for_a_run").exists()
    )


def test_overwrite_deletes_nothing_while_the_input_is_bad(faces, stage1, flags, monkeypatch, capsys):
    """An optimizer that is not installed shows late, when the module is there."""
    from scf_fast import train

    before = snapshot(stage1[0])
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *map(
                str,
                [
                    *flags["stage1"],
                    "--optimizer",
                    "apex",
                    "--data",
                    faces / "train",
                    "--output_dir",
                    stage1[0],
                    "--overwrite",
                ],
            ),
        ],
    )
    try:
        assert train.main() == 2
    finally:
        distributed.finish()
    assert "cannot be used here" in capsys.readouterr().err
    assert snapshot(stage1[0]) == before


def snapshot(folder):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_status_2(case, faces, stage1, flags, tmp_path, monkeypatch, capsys):
    """In this process, so that ten starts of the interpreter are saved; that of several ranks is tested below."""
    from scf_fast import train

    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    make, expected = BAD[case]
    arguments = make(faces / "train", stage1[0], tmp_path)
    if "--output_dir" not in arguments:
        arguments += ["--output_dir", tmp_path / "out"]
    before = snapshot(stage1[0])
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*flags["stage1"], "--zero_stage", 2, *arguments])])
    assert train.main() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: error: ") and expected in lines[0], lines
    assert not (tmp_path / "out").exists()
    assert snapshot(stage1[0]) == before


@pytest.mark.parametrize(
    "swap, expected",
    [("both", "no backbone"), ("width", "from the same stage-1 run"), ("classes", "only 3 class centers")],
)
def test_stage_2_refuses_weights_that_do_not_fit(swap, expected, faces, stage1, flags, tmp_path, monkeypatch, capsys):
    from scf_fast import train

    backbone, centers = stage1[0] / "backbone.pth", stage1[0] / "fc.pth"
    if swap == "both":
        backbone, centers = centers, backbone
    else:
        shape = (8, 16) if swap == "width" else (3, 32)
        torch.save(torch.randn(shape), tmp_path / "fc.pth")
        centers = tmp_path / "fc.pth"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            *map(
                str,
                [
                    *flags["stage2"],
                    "--saved_bkb",
                    backbone,
                    "--saved_fc",
                    centers,
                    "--data",
                    faces / "train",
                    "--output_dir",
                    tmp_path / "out",
                ],
            ),
        ],
    )
    assert train.main() == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and ("must hold" in error if swap == "both" else expected in error)


def test_bad_input_of_two_ranks_is_said_once(faces, flags, tmp_path, fork_ranks):
    """That the deepspeed launcher passes a status on is seen where a signal stops the ranks, run/test_step_guard.py."""
    words = ["--batch_size", 33, "--data", faces / "train", "--output_dir", tmp_path / "out"]
    status, output = fork_ranks(2, *flags["stage1"], *words)
    assert status == 2
    assert output.count("--batch_size 33 must be divisible by ranks") == 1
    assert "Traceback" not in output and not Path(tmp_path / "out").exists()


def test_two_tasks_of_srun_are_one_run(faces, stage1, flags, tmp_path, fork_ranks):
    """Not two that train alone and delete each other's files."""
    command = [*flags["stage1"], "--zero_stage", 2, "--data", faces / "train", "--output_dir", tmp_path / "run"]
    status, output = fork_ranks(2, *command, "--max_steps", 3, launcher="srun")
    assert status == 0 and "2 ranks on" in output, output
    assert losses(tmp_path / "run", "loss") == losses(stage1[0], "loss")[:3]
    assert not list((tmp_path / "run").glob(".lock*"))


def test_variables_that_would_train_alone_are_one_line(faces, flags, tmp_path, monkeypatch, capsys):
    from scf_fast import train

    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [*flags["stage1"], "--data", faces / "train", "--output_dir", tmp_path / "run"]
    assert train.main(list(map(str, command))) == 2
    assert capsys.readouterr().err.startswith(
        "train.py: error: WORLD_SIZE=2 is set and RANK is not; start with torchrun"
    )
    assert not (tmp_path / "run").exists()


def test_ranks_that_are_started_again_go_on_without_resume(faces, stage1, flags, tmp_path, fork_ranks):
    """As torchrun --max_restarts starts them: with the flags of the first start, which must not begin anew."""
    shutil.copytree(stage1[0], tmp_path / "run")
    command = [*flags["stage1"], "--zero_stage", 0, "--data", faces / "train", "--output_dir", tmp_path / "run"]
    restarted = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    more = ["--epochs", 3, "--max_steps", STEPS + 1, "--overwrite"]
    status, output = fork_ranks(1, *command, *more, variables=restarted)
    assert status == 0 and f"resumed at step {STEPS}" in output, output
