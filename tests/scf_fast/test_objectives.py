"""Launches of stage 2 under each objective: against plain PyTorch, from the feature cache, resumed on other numbers of
ranks, several together, and bad input.
"""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from scf_fast.model import SCF
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.loader import make_loader
from scf_fast.pipelines.loading.base import Preprocessing
from scf_fast.pipelines.sampling.pair_sampler import PairSampler
from scf_fast.pipelines.sampling.sampler import EpochSampler
from scf_fast.weights.reading import read_weights

DIM, SEED, LR, DECAY, START = 32, 777, 3e-5, 5e-4, 30.0
# 16 images a person are dealt as 5, 5 and 6: batches of 20 to 24 images, 6 an epoch.
PAIRS = ["--pair_batch", "4,5"]
GROUPS = 3 * 8


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(folder, key="total_loss"):
    return [record[key] for record in records(folder)]


@pytest.fixture(scope="module")
def tiny(faces, tmp_path_factory):
    """Flags of a stage 2 on a backbone without training, with a feature cache; and the folder of its weights."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    torch.save(Backbone("ir_tiny", DIM).state_dict(), folder / "backbone.pth")
    centers = {"arc_face_state_dict": {"weight": torch.randn(8, DIM)}, "normalization": "insightface"}
    torch.save(centers, folder / "fc.pth")
    flags = ["--stage", "confidence", "--data", faces / "train", "--saved_bkb", folder / "backbone.pth"]
    flags += ["--feature_cache", folder / "cache", "--cache_dtype", "fp32", "--precision", "fp32", "--num_workers", 1]
    return [*flags, "--lr", LR, "--lr_scheduler", "Constant", "--log_every", 1, "--no_tensorboard"], folder


@pytest.fixture(scope="module")
def launch(tiny, fork_ranks):
    """``launch(ranks, folder, *flags)``: trains from the cache into a folder and returns the output."""

    def run(ranks, folder, *flags):
        status, output = fork_ranks(ranks, *tiny[0], *flags, "--output_dir", folder)
        assert status == 0 and "Traceback" not in output, output
        return output

    return run


class LogBessel(torch.autograd.Function):
    """log I_v(kappa) by scipy in float64, with its derivative I_(v+1)/I_v + v/kappa."""

    @staticmethod
    def forward(ctx, order, kappa):
        ctx.order = order
        ctx.save_for_backward(kappa)
        return torch.from_numpy(np.log(scipy.special.ive(order, kappa.detach().numpy()))) + kappa

    @staticmethod
    def backward(ctx, gradient):
        (kappa,), v = ctx.saved_tensors, ctx.order
        ratio = scipy.special.ive(v + 1, kappa.numpy()) / scipy.special.ive(v, kappa.numpy())
        return None, gradient * (torch.from_numpy(ratio) + v / kappa)


def log_vmf_normalizer(kappa):
    v = DIM / 2 - 1
    return v * kappa.log() - DIM / 2 * math.log(2 * math.pi) - LogBessel.apply(v, kappa)


def plain_loss(objective, mu, value, centers, labels, sizes):
    """The losses of DESIGN and of the two papers, in float64; ``value`` is kappa or the variance."""
    if objective == "scf":
        return (-value * (mu * centers[labels]).sum(1) - log_vmf_normalizer(value)).mean() + DIM * math.log(64)
    if objective == "scf_gaussian":
        squares = ((mu - centers[labels]) ** 2).sum(1)
        return (squares / (2 * value) + DIM / 2 * (2 * math.pi * value).log()).mean()
    a, b = torch.cat([torch.combinations(rows) for rows in torch.arange(len(mu)).split(sizes)]).T
    if objective == "pfe":
        v = value[a] + value[b]
        return (((mu[a] - mu[b]) ** 2).sum(1) / (2 * v) + DIM / 2 * (2 * math.pi * v).log()).mean()
    joint = (value[a, None] * mu[a] + value[b, None] * mu[b]).norm(dim=1)
    score = log_vmf_normalizer(value[a]) + log_vmf_normalizer(value[b]) - log_vmf_normalizer(joint)
    return (DIM * math.log(64) - score).mean()


def plain_training(objective, steps, features, convf, centers, labels, sampler):
    """Losses of a loop in plain PyTorch on the images of each step."""
    start = START if objective in ("scf", "pfe_vmf") else 1 / START
    torch.manual_seed(SEED)
    initial = build_confidence_net("mlp", convf.shape[1], convf.shape[2], start).state_dict()
    width = convf[0].numel()
    layers = [nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width // 4), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width // 4, 1))
    net.load_state_dict({key.removeprefix("_log_kappa."): value for key, value in initial.items()})
    net.double()
    optimizer = torch.optim.Adam(net.parameters(), LR, weight_decay=DECAY)
    mu, losses = F.normalize(features.double()), []
    for epoch, batch in (divmod(step, sampler.batches_per_epoch) for step in range(steps)):
        images = torch.from_numpy(sampler.indices(epoch, batch).copy())
        sizes = sampler.group_sizes(epoch, batch).tolist() if isinstance(sampler, PairSampler) else None
        value = 1e-6 + net(convf[images].double().flatten(1)).squeeze(1).exp()
        loss = plain_loss(objective, mu[images], value, F.normalize(centers.double()), labels[images], sizes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("objectives", [("scf", "scf_gaussian"), ("pfe", "pfe_vmf")])
def test_200_steps_are_those_of_a_plain_loop(objectives, faces, tiny, tmp_path, launch):
    """Two objectives a launch, each of which trains as it would alone."""
    steps, pairwise = 200, "pfe" in objectives
    more = ["--pair_batch", "2,5"] if pairwise else ["--saved_fc", tiny[1] / "fc.pth", "--batch_size", 8]
    more += ["--no_flip", "--initial_kappa", START, "--slope", "exact", "--max_steps", steps, "--epochs", 50]
    launch(0, tmp_path / "run", "--objective", ",".join(objectives), *more)
    source = open_source(faces / "train")
    with make_loader(source, EpochSampler(128, 128, shuffle=False), Preprocessing("insightface", False)) as loader:
        images = next(loader.batches(0)).images
    backbone = Backbone("ir_tiny", DIM).eval()
    backbone.load_state_dict(torch.load(tiny[1] / "backbone.pth"))
    with torch.no_grad():
        features, convf = backbone(images)
    sampler = PairSampler(source.labels, 2, 5, seed=SEED) if pairwise else EpochSampler(128, 8, seed=SEED)
    centers = torch.load(tiny[1] / "fc.pth")["arc_face_state_dict"]["weight"]
    for objective in objectives:
        expected = plain_training(objective, steps, features, convf, centers, torch.tensor(source.labels), sampler)
        found = values(tmp_path / "run", f"{objective}/total_loss")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert np.ptp(expected) > 1  # it has come a way


def test_pairs_resume_on_other_ranks_in_the_middle_of_an_epoch(tiny, tmp_path, launch):
    """Two ranks, then one, then two with another ZeRO stage; and one in two micro-batches: the mean is over the pairs
    of the global batch, however these divide it.
    """
    pairs = ["--objective", "pfe", "--variance", "diagonal", "--initial_kappa", 20, "--epochs", 2, *PAIRS]
    for ranks, more in ((2, ["--max_steps", 3]), (1, ["--max_steps", 8, "--zero_stage", 3]), (2, ["--zero_stage", 0])):
        output = launch(ranks, tmp_path / "run", *pairs, "--resume", *more)
    assert "resumed at step 8 (epoch 2), written by 1 ranks with ZeRO 3" in output
    assert f"groups of a person: {GROUPS} of 128 images an epoch; 0 images are left out" in output
    assert "pixels: insightface, as noted with --saved_bkb" in output
    launch(0, tmp_path / "whole", *pairs, "--gradient_accumulation_steps", 2)
    assert values(tmp_path / "run", "step") == list(range(1, 13))
    for key in ("total_loss", "precision", "variance", "pairs"):
        assert values(tmp_path / "run", key) == pytest.approx(values(tmp_path / "whole", key), rel=1e-5)
    sampler = PairSampler(np.repeat(np.arange(8), 16), 4, 5, seed=SEED)
    numbers = [sum(math.comb(size, 2) for size in sampler.group_sizes(*divmod(step, 6)).tolist()) for step in range(12)]
    assert values(tmp_path / "whole", "pairs") == numbers and len(set(numbers)) > 1


def test_several_leave_what_each_would_leave_alone(tiny, tmp_path, launch):
    """With a net that has BatchNorm, from weights that the seed draws: bit for bit."""
    own = ["--confidence_net", "pfe", "--epochs", 1, "--zero_stage", 0, "--initial_kappa", 40]
    joint = tmp_path / "joint"
    launch(0, joint, "--objective", "pfe_vmf,pfe", *PAIRS, *own)
    for objective in ("pfe", "pfe_vmf"):
        alone = tmp_path / objective
        launch(0, alone, "--objective", objective, *PAIRS, *own)
        for key in set(records(alone)[0]) - {"step", "lr", "images_per_second"}:
            assert values(joint, f"{objective}/{key}") == values(alone, key)
        for name in ("confidence.pth", "scf_model.pt"):
            found, expected = torch.load(joint / objective / name), torch.load(alone / name)
            assert found["objective"] == objective and found.keys() == expected.keys()
            for part in (key for key in expected if key.endswith("state_dict")):
                torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
        weights = read_weights(joint / objective)
        assert weights.objective.value == objective and weights.facts.normalizer is None
    total = np.add(values(tmp_path / "pfe"), values(tmp_path / "pfe_vmf"))
    np.testing.assert_allclose(values(joint), total, rtol=1e-6)
    assert not (joint / "scf_model.pt").exists() and not (joint / "hparams.json").exists()
    assert yaml.safe_load((joint / "config.yaml").read_text())["config"]["objective"] == ["pfe", "pfe_vmf"]


def test_the_published_rule_and_a_backbone_that_trains_too(faces, tiny, tmp_path, fork_ranks):
    flags = ["--stage", "confidence", "--data", faces / "train", "--saved_bkb", tiny[1] / "backbone.pth"]
    flags += [
        "--objective",
        "pfe",
        *PAIRS,
        "--finetune_bkb",
        "--update_rule",
        "sgd",
        "--max_steps",
        3,
        "--log_every",
        1,
    ]
    status, output = fork_ranks(2, *flags, "--num_workers", 0, "--loader", "torch", "--output_dir", tmp_path / "run")
    assert status == 0 and "optimizer: fused SGD" in output, output
    assert all(map(math.isfinite, values(tmp_path / "run")))
    model, before = SCF.from_checkpoint(tmp_path / "run"), torch.load(tiny[1] / "backbone.pth")
    assert not torch.equal(model.backbone.state_dict()["output_layer.3.weight"], before["output_layer.3.weight"])


def few(faces, tmp_path, images):
    """A folder of a few images of each of four people."""
    source = open_source(faces / "train")
    for i in range(4 * 16):  # in the order of the people
        number = i % 16
        if number < images:
            path = tmp_path / "few" / f"person{source.labels[i]}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.encoded(i))
    return tmp_path / "few"


BAD = {
    "one image a person": (
        lambda f, t: ["--data", few(f, t, 1), "--pair_batch", "2,2"],
        "pairs of a person need two images of somebody",
    ),
    "too few groups": (
        lambda f, t: ["--data", few(f, t, 3), "--pair_batch", "6,3"],
        "make 4 groups of 3 of a person, which fill no batch of 6",
    ),
    "one person a micro-batch": (
        lambda f, t: ["--pair_batch", "4,4", "--gradient_accumulation_steps", "4"],
        "at least twice that, so that no batch is of one person; nearest: 8,4",
    ),
    "groups that do not divide": (
        lambda f, t: ["--pair_batch", "5,4", "--gradient_accumulation_steps", "2"],
        "--pair_batch 5,4: the people must be a multiple of ranks x --gradient_accumulation_steps = 1 x 2",
    ),
    "one image a BatchNorm": (
        lambda f, t: ["--objective", "scf_gaussian", "--saved_fc", "f", "--confidence_net", "pfe", "--batch_size", "1"],
        "--batch_size must be at least 2, two images a rank and micro-batch, got 1",
    ),
    "a run of another objective": (
        lambda f, t: ["--objective", "pfe_vmf", *PAIRS, "--output_dir", t / "pfe", "--resume"],
        "holds a different run (objective ['pfe'] -> ['pfe_vmf'])",
    ),
    "a checkpoint of another objective": (
        lambda f, t: [
            *["--objective", "scf", "--saved_fc", t / "fc.pth", "--batch_size", "20"],
            *["--output_dir", t / "bare", "--resume"],
        ],
        "--resume: the checkpoint was trained with --objective pfe, this is scf; give that objective",
    ),
}


@pytest.fixture(scope="module")
def bad_inputs(tiny, launch):
    """The folder of the weights, with a run of PFE in it, and one whose config.yaml is gone."""
    launch(0, tiny[1] / "pfe", "--objective", "pfe", *PAIRS, "--max_steps", 1)
    shutil.copytree(tiny[1] / "pfe", tiny[1] / "bare")
    (tiny[1] / "bare" / "config.yaml").unlink()
    return tiny[1]


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_status_2(case, faces, tiny, bad_inputs, tmp_path, monkeypatch, capsys):
    from scf_fast import train

    make, expected = BAD[case]
    if case.startswith("a "):
        arguments = make(faces, bad_inputs)
    else:
        arguments = ["--objective", "pfe", *make(faces, tmp_path), "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*tiny[0], *arguments])])
    assert train.main() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: ") and expected in error
    assert not (tmp_path / "out").exists()
