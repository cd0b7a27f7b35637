"""The short version of ``make chaos``: stage 1, two faults, half of the images, a few flipped bits."""

import json
import random

import pytest

from bench.robustness import chaos
from bench.robustness.faults import Job
from bench.robustness.flips import DETECTED, HARMLESS, USED, Written, try_flips
from scf_fast.errors import InputError


@pytest.fixture
def forked(monkeypatch, start_ranks):
    """Jobs that start without a launcher."""

    def start(job, ranks=2, zero_stage=2, file_bytes=None):
        flags = ["--zero_stage", zero_stage, "--output_dir", job.out, "--resume"]
        command = ["-m", "scf_fast.train", *job.arguments, *flags]
        return start_ranks(ranks, *command, log=job.log, file_bytes=file_bytes)

    monkeypatch.setattr(Job, "start", start)


def test_a_run_under_faults_ends_as_one_left_alone(forked, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(chaos, "IMAGES_EACH", chaos.IMAGES_EACH // 2)
    monkeypatch.setattr(chaos, "STEPS", chaos.STEPS // 2)
    monkeypatch.setattr(chaos, "FLIPS", 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    faults = ["--stages", "1", "--kinds", "kill_in_checkpoint,corrupt_checkpoint"]
    status = chaos.main([*faults, "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    output, _ = capfd.readouterr()
    assert status == 0, output
    assert "samples lost 0, samples repeated within an epoch 0, losses equal" in output
    result = json.loads(next(tmp_path.glob("chaos-*.json")).read_text())
    assert (result["faults_tried"], result["faults_survived"], result["flips_silently_used"]) == (2, 2, 0)
    assert {"backbone.pth", "fc.pth", "1: state.json", "1: rank0.pt", "1: config.yaml", "index"} <= result[
        "flips"
    ].keys()
    assert all(sum(counts.values()) == 4 for counts in result["flips"].values())
    assert result["stages"]["stage 1"]["largest_difference"] == 0
    log = (tmp_path / "work" / "tormented1.log").read_text()
    assert "is damaged" in log and "trying the one before it" in log and "resumed at step" in log


def test_lost_and_repeated_images_and_other_losses_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "IDENTITIES", 2)
    monkeypatch.setattr(chaos, "IMAGES_EACH", 2)
    monkeypatch.setattr(chaos, "EPOCHS", 1)
    monkeypatch.setattr(chaos, "STEPS", 2)
    for name, steps, loss in (
        ("alone", ([0, 1], [3, 3]), 2.0),  # 2 is corrupt, 3 stands in for it
        ("out", ([0, 3], [3, 3]), 2.5),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i in (1, 2)))
        for rank in range(2):
            lines = [json.dumps({"step": i, "images": images[rank : rank + 1]}) for i, images in enumerate(steps, 1)]
            (folder / f"samples_rank{rank}.jsonl").write_text("\n".join(lines))
    same = chaos.compare(tmp_path / "alone", tmp_path / "alone", {2}, "loss")
    assert (same["lost"], same["repeated"], same["largest_difference"]) == (0, 0, 0)
    other = chaos.compare(tmp_path / "out", tmp_path / "alone", {2}, "loss")
    assert (other["lost"], other["repeated"], other["largest_difference"]) == (1, 1, 0.25)


def test_a_flip_that_a_reader_takes_for_the_truth_is_counted(tmp_path):
    path = tmp_path / "number.txt"
    path.write_text("12345678")
    reader = Written("number", path, path.read_bytes)
    assert try_flips(reader, 5, random.Random(0)) == {USED: 5} and path.read_text() == "12345678"

    def refuse():
        if path.read_bytes() != b"12345678":
            raise InputError("damaged")

    assert try_flips(Written("number", path, refuse), 5, random.Random(0)) == {DETECTED: 5}
    assert try_flips(Written("number", path, lambda: None), 5, random.Random(0)) == {HARMLESS: 5}
    with pytest.raises(ValueError, match="invalid literal"):  # a command would show a traceback
        try_flips(Written("number", path, lambda: int(path.read_bytes(), 2)), 5, random.Random(0))
