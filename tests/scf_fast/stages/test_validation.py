"""People held out of stage 2: never shown, measured after each epoch, and waited for."""

import json

import numpy as np
import pytest
import torch

from scf_fast.kernels import pair_likelihood_loss, scf_loss
from scf_fast.model import SCF
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.pipelines.sampling.selection import hold_out_people
from scf_fast.run.patience import Patience
from scf_fast.weights.reading import read_weights

SEED = 777  # the default


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def embedded(folder, source, rows):
    """Returns features and what a run's net predicts of images."""
    model, sampler = SCF.from_checkpoint(folder), EpochSampler(len(source), len(source), shuffle=False)
    with make_loader(source, sampler, Preprocessing(model.normalization, False)) as loader:
        return model.embed(next(loader.batches(0)).images[torch.from_numpy(rows)])


@pytest.fixture
def train(faces, stage1, flags, tmp_path, fork_ranks):
    weights = ["--saved_bkb", stage1[0] / "backbone.pth", "--saved_fc", stage1[0] / "fc.pth"]
    folders = ["--data", faces / "train", "--output_dir", tmp_path / "run"]

    def run(world_size, *more, status=0):
        found, output = fork_ranks(world_size, *flags["stage2"], *weights, *folders, *more)
        assert found == status, output
        return output

    return run


def test_held_out_people_are_measured_and_never_shown(train, faces, stage1, tmp_path):
    """The loss of the last epoch is that of the exported model."""
    output = train(2, "--validation", 0.25, "--keep_best", "--record_samples", "--feature_cache", tmp_path / "cache")
    source = open_source(faces / "train")
    held_out = hold_out_people(source.labels, 0.25, SEED)
    assert held_out.sum() == 32
    shown = [
        i for path in (tmp_path / "run").glob("samples_rank*.jsonl") for line in lines_of(path) for i in line["images"]
    ]
    assert len(shown) == 2 * 96 and not held_out[shown].any() and len(set(shown)) == 96
    records = lines_of(tmp_path / "run" / "metrics.jsonl")
    measured = [record for record in records if "validation/loss" in record]
    assert [record["step"] for record in measured] == [3, 6] and len(records) == 8
    assert set(measured[0]) >= {f"validation/{name}" for name in ("spearman", "reject_area", "kappa_factor")}
    assert output.count("predicted  observed") == 2

    centers, rows = read_weights(stage1[0] / "fc.pth", "fc").class_centers, np.flatnonzero(held_out)
    features, log_kappa = embedded(tmp_path / "run", source, rows)
    expected = scf_loss(features, log_kappa, centers, torch.from_numpy(source.labels[rows])).item()
    assert measured[-1]["validation/loss"] == pytest.approx(expected, abs=0.02)  # the cache is bf16
    assert (tmp_path / "run" / "checkpoints").exists()


def test_pairs_are_validated(train, faces, stage1, tmp_path):
    """The loss is that of the groups of people never shown."""
    pairs = ["--objective", "pfe,pfe_vmf", "--pair_batch", "4,3", "--batch_size", 12, "--record_samples"]
    train(2, "--validation", 0.25, *pairs)
    run = tmp_path / "run"
    source = open_source(faces / "train")
    held_out = hold_out_people(source.labels, 0.25, SEED)
    shown = [i for path in run.glob("samples_rank*.jsonl") for line in lines_of(path) for i in line["images"]]
    assert shown and not held_out[shown].any()
    last = [record for record in lines_of(run / "metrics.jsonl") if "validation/loss" in record][-1]
    sampler = PairSampler(source.labels, 4, 3, seed=SEED, last_batch="partial", chosen=held_out)
    batches = range(sampler.batches_per_epoch)
    groups = [sampler.indices(0, batch) for batch in batches]
    assert sorted(np.concatenate(groups)) == np.flatnonzero(held_out).tolist()
    keys = np.concatenate(
        [np.arange(4 * b, 4 * b + len(s)).repeat(s) for b in batches for s in [sampler.group_sizes(0, b)]]
    )
    for name, density in (("pfe", "gaussian"), ("pfe_vmf", "vmf")):
        features, parameter = embedded(run / name, source, np.concatenate(groups))
        loss = pair_likelihood_loss(features, parameter, torch.from_numpy(keys), density=density).item()
        assert last[f"{name}/validation/loss"] == pytest.approx(loss, rel=1e-4)
    assert last["validation/loss"] == pytest.approx(last["pfe/validation/loss"] + last["pfe_vmf/validation/loss"])


def test_a_trained_backbone_is_validated(train, faces, stage1, tmp_path):
    train(1, "--validation", 0.25, "--finetune_bkb", "--epochs", 1)
    source, centers = open_source(faces / "train"), read_weights(stage1[0] / "fc.pth", "fc").class_centers
    rows = np.flatnonzero(hold_out_people(source.labels, 0.25, SEED))
    features, log_kappa = embedded(tmp_path / "run", source, rows)
    loss = scf_loss(features, log_kappa, centers, torch.from_numpy(source.labels[rows])).item()
    last = [record for record in lines_of(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in record][-1]
    assert last["validation/loss"] == pytest.approx(loss, rel=1e-4)


def test_a_run_ends_when_its_patience_is_over(train, tmp_path):
    flags = ["--validation", 0.25, "--patience", 1, "--epochs", 5, "--lr", "1e-30", "--confidence_net", "mlp"]
    output = train(1, *flags)
    assert "no lower loss of the people held out for 1 epochs: the run ends" in output
    assert lines_of(tmp_path / "run" / "events.jsonl")[-1]["step"] == 6
    assert "its patience is over" in train(1, *flags, "--resume")


def test_patience():
    patience = Patience(2)
    for loss, is_over in ((3.0, False), (3.0, False), (2.0, False), (float("nan"), False), (2.5, True)):
        patience.add(loss)
        assert patience.is_over is is_over
    resumed = Patience(2)
    resumed.restore(patience.state())
    assert resumed.is_over and Patience(2).state() is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--validation", 0.1],
            "--validation 0.1: a share of 0.1 holds out 1 of 8 people; at least 2 must be held out",
        ),
        (["--validation", 1], "--validation must be a share of the people"),
        (["--patience", 1], "--patience must be 0 without --validation"),
        (
            ["--validation", 0.25, "--images_per_identity", 2],
            "--images_per_identity must be left out with --validation",
        ),
    ],
)
def test_validation_that_cannot_be(more, expected, train, tmp_path):
    assert expected in train(0, *more, status=2)
    assert not (tmp_path / "run").exists()
