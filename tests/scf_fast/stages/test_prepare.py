"""Stage 2 starts where its features say, at a learning rate that its net bears; a resumed run keeps both."""

import json

import pytest
import torch

from scf_fast.kernels import inverse_mean_resultant_length
from scf_fast.model import SCF


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def train(faces, stage1, flags, tmp_path, fork_ranks):
    """``train(world_size, *flags)`` a stage 2 with the MLP; returns the metrics of its steps and its log."""
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth"]
    folders = ["--data", faces / "train", "--output_dir", tmp_path / "run"]

    def run(world_size, *more):
        flags2 = [*flags["stage2"], "--confidence_net", "mlp", "--initial_kappa", "auto", *weights, *folders, *more]
        status, output = fork_ranks(world_size, *flags2)
        assert status == 0, output
        return lines_of(tmp_path / "run" / "metrics.jsonl"), output

    return run


@pytest.mark.parametrize(
    "more, limit", [([], 4), (["--finetune_bkb", "--max_first_step", 2], 2)], ids=["frozen", "finetuned"]
)
def test_start_is_the_kappa_of_the_mean_cosine_and_a_rate_that_breaks_the_net_is_lowered(more, limit, train):
    metrics, output = train(1, "--lr", "0.1", "--max_steps", 3, "--no_flip", *more)
    (said,) = (line for line in output.splitlines() if "SCF starts at a kappa of" in line)
    kappa, cosine = float(said.split(" of ")[1].split(",")[0]), float(said.split("cosine ")[1].split()[0])
    assert kappa == pytest.approx(inverse_mean_resultant_length(torch.tensor(cosine), 32).item(), rel=0.01)
    assert metrics[0]["kappa"] == pytest.approx(kappa, rel=0.1)
    assert "--lr 0.1 is lowered to" in output and f"--max_first_step is {limit}" in output
    rates = [record["lr"] for record in metrics]
    assert rates[0] == rates[1] < 0.01 and all(record["kappa"] < 200 * kappa for record in metrics)


def test_a_resumed_run_keeps_its_limit(train):
    before, _ = train(2, "--lr", "0.1", "--max_steps", 2)
    after, output = train(1, "--lr", "0.1", "--max_steps", 4, "--resume")
    assert len({record["lr"] for record in after}) == 1 and len(after) == 4 and after[:2] == before
    assert "starts at" not in output and "lowered" not in output


def test_without_start_and_limit_nothing_is_measured(train):
    metrics, output = train(1, "--initial_kappa", 3, "--max_first_step", 0, "--lr", "0.001", "--max_steps", 1)
    assert metrics[0]["kappa"] == pytest.approx(3, rel=0.2) and metrics[0]["lr"] == 0.001
    assert "starts at" not in output


def test_a_net_that_has_died_is_written_with_a_warning(train, tmp_path):
    """As the learning rate alone made it before there was a limit."""
    _, output = train(1, "--lr", "1", "--slope", "exact", "--max_first_step", 0)
    model = torch.load(tmp_path / "run" / "scf_model.pt")
    assert "confidence net has" in model["warning"]
    assert f"SCF: {model['warning']}; the model is written with this warning" in output
    assert SCF.from_checkpoint(tmp_path / "run").embedding_dim == 32
