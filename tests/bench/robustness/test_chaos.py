"""The short version of ``make chaos``: stage 1, two faults, half of the images."""

import json

import pytest

from bench.robustness import chaos
from bench.robustness.faults import Job


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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    faults = ["--stages", "1", "--kinds", "kill_in_checkpoint,corrupt_checkpoint"]
    status = chaos.main([*faults, "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    output, _ = capfd.readouterr()
    assert status == 0, output
    assert "samples lost 0, samples repeated within an epoch 0, losses equal" in output
    result = json.loads(next(tmp_path.glob("chaos-*.json")).read_text())
    assert result["faults_survived"] == 2 and result["stages"]["stage 1"]["largest_difference"] == 0
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
