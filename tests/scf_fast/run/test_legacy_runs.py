"""Runs, caches and indices written by earlier versions resume under this one, to the numbers that those versions would
have reached.

A script of tests/legacy writes what a commit left on disk. Here the commands of the checkout continue it. No module of
the project decides the expected values: they are those that the script has drawn, or follow from them in plain PyTorch.
To that end gradients are clipped to nothing, so that weights, optimizer state and learning rate alone decide a step.

A version that changes a format, or adds a key to one, adds a script: to COMMITS where it writes all the folders, or
like `pairs` beside them; and to a test here a value of that key that is not its default, with its consequence.
"""

import importlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from scipy.special import ive
from torch import nn

from scf_fast.model import SCF
from scf_fast.objectives import Objective

COMMITS = ("0428aba",)
SCRIPTS = Path(__file__).resolve().parents[2] / "legacy"
NO_GRADIENTS = ["--max_grad_clip", "1e-20"]  # the weight decay comes after it, and stays


@pytest.fixture(scope="module", params=COMMITS)
def old(request, faces, tmp_path_factory):
    """Files of a commit: their folder `root` and their `content`; `script` has the flags of the runs."""
    root, rec = tmp_path_factory.mktemp("old") / request.param, faces / "train" / "train.rec"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # a later script may import an earlier one
        script = importlib.import_module(f"write_run_{request.param}")
    script.main([str(root), "--rec", str(rec)])
    return SimpleNamespace(root=root, script=script, content=script.Content(rec))


@pytest.fixture(scope="module")
def pairs(old, faces):
    """The run of write_run_objectives.py, beside the folders of `old`: its `folder`, `content` and `script`."""
    rec = faces / "train" / "train.rec"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        script = importlib.import_module("write_run_objectives")
    script.main([str(old.root), "--rec", str(rec)])
    return SimpleNamespace(folder=old.root / "pairs", script=script, content=script.Content(rec))


@pytest.fixture(autouse=True)
def same_index(old):
    """Every test reads the index of the data as it is."""
    index = old.root / "data" / "train.rec.index"
    before = index.stat().st_mtime_ns, index.read_bytes()
    yield
    assert (index.stat().st_mtime_ns, index.read_bytes()) == before
    assert len(list(index.parent.iterdir())) == 3  # and none was made under another name


def flags(old, stage):
    """Returns the flags of an old run that a resume has to repeat."""
    weights = ["--saved_bkb", old.root / "stage1" / "backbone.pth", "--saved_fc", old.root / "stage1" / "fc.pth"]
    own = {"stage1": old.script.STAGE1_FLAGS, "stage2": [*old.script.STAGE2_FLAGS, *weights]}[stage]
    return [*own, *old.script.COMMON_FLAGS, "--data", old.root / "data"]


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def assert_has(found, expected):
    """A later version may say more."""
    assert {key: found.get(key) for key in expected} == expected


def assert_same_records(cache, before):
    for path in before.glob("*.bin"):
        assert (cache / path.name).read_bytes() == path.read_bytes(), path.name


def assert_moved_to(found, expected, before):
    """Weights went where they should: to within rounding, and to far less than the way they have come."""
    assert found.shape == before.shape
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=1e-8)
    assert (expected - before.double()).norm() > 1e-4 * before.double().norm()


def momentum_steps(weight, momentum, rates, decay):
    """SGD without gradients, in float64."""
    weight, momentum = weight.double(), momentum.double()
    for rate in rates:
        momentum = 0.9 * momentum + decay * weight
        weight = weight - rate * momentum
    return weight


def adam_step(weight, exp_avg, exp_avg_sq, update, rate, decay):
    """The update with this number, counted from 1, without gradients, in float64."""
    exp_avg = 0.9 * exp_avg + 0.1 * decay * weight
    exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * (decay * weight) ** 2
    size = (exp_avg_sq / (1 - 0.999**update)).sqrt() + 1e-8
    return weight - rate * exp_avg / (1 - 0.9**update) / size, exp_avg, exp_avg_sq


def confidence_net(state):
    """The convolutional confidence net: a module whose parts are `conv_` and `_log_kappa`."""
    channels = len(state["conv_.0.weight"])
    first, second, third = (nn.Conv2d(channels, channels, 3, bias=False) for _ in range(3))
    layers = [first, nn.ReLU(), second, nn.BatchNorm2d(channels), nn.ReLU(), third, nn.BatchNorm2d(channels)]
    head = [nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)]
    net = nn.ModuleDict({"conv_": nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), "_log_kappa": nn.Sequential(*head)})
    net.load_state_dict(state)
    return net


def kappa_of(net, maps):
    raw = net["_log_kappa"](net["conv_"](maps).flatten(1)).squeeze(1)
    return raw.exp() + 1e-6


def features_and_map(state, images):
    """An ir_small in evaluation mode, in float64."""
    state = {name: value.double() for name, value in state.items()}

    def norm(x, name):
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias)

    def unit(x, name, stride):
        y = F.conv2d(norm(x, f"{name}.res_layer.0"), state[f"{name}.res_layer.1.weight"], padding=1)
        y = F.prelu(y, state[f"{name}.res_layer.2.weight"])
        y = norm(F.conv2d(y, state[f"{name}.res_layer.3.weight"], stride=stride, padding=1), f"{name}.res_layer.4")
        projection = state.get(f"{name}.shortcut_layer.0.weight")
        if projection is None:
            return y + x[:, :, ::stride, ::stride]
        return y + norm(F.conv2d(x, projection, stride=stride), f"{name}.shortcut_layer.1")

    x = norm(F.conv2d(images.double(), state["input_layer.0.weight"], stride=2, padding=1), "input_layer.1")
    x = F.prelu(x, state["input_layer.2.weight"])
    for number, stride in enumerate((2, 2, 1, 2, 1, 1)):
        x = unit(x, f"body.{number}", stride)
    flat = norm(x, "output_layer.0").flatten(1)
    features = F.linear(flat, state["output_layer.3.weight"], state["output_layer.3.bias"])
    return norm(features, "output_layer.4"), x


def test_stage_1_on_as_many_ranks_has_every_bit(old, tmp_path, fork_ranks):
    """A run with nothing left to do writes its weights at once."""
    run, content, script = tmp_path / "run", old.content, old.script
    shutil.copytree(old.root / "stage1", run, ignore=shutil.ignore_patterns("*.pth"))
    more = ["--zero_stage", 2, "--max_steps", script.STEP]
    status, output = fork_ranks(2, *flags(old, "stage1"), "--output_dir", run, "--resume", *more)
    assert status == 0, output
    assert "resumed at step 6 (epoch 2)" in output and "written by" not in output and "nothing to do" in output
    assert_same_bits(torch.load(run / "backbone.pth"), content.backbone)
    fc = torch.load(run / "fc.pth")
    assert_same_bits(fc["arc_face_state_dict"], {"weight": content.class_centers})
    assert_has(fc, {"normalization": script.NORMALIZATION, "epoch": 1, "global_step": script.STEP - 1})


def test_stage_1_goes_on_with_another_number_of_ranks(old, tmp_path, fork_ranks):
    run, content, script = tmp_path / "run", old.content, old.script
    shutil.copytree(old.root / "stage1", run)
    more = [*NO_GRADIENTS, "--keep_checkpoints", 1, "--keep_best"]
    status, output = fork_ranks(0, *flags(old, "stage1"), "--output_dir", run, "--resume", *more)
    assert status == 0, output
    assert "resumed at step 6 (epoch 2), written by 2 ranks with ZeRO 2" in output
    assert "; 1 broken images;" in output  # noted in the index

    steps, rates = (script.STEP + 1, script.STEPS), (script.STAGE1_LR * 2 / 8, script.STAGE1_LR * 1 / 8)
    state = torch.load(run / "backbone.pth")
    for name, before in script.trained(content.backbone).items():
        expected = momentum_steps(before, content.momentum[name], rates, script.WEIGHT_DECAY)
        assert_moved_to(state[name], expected, before)
    assert all(value == script.STEPS for name, value in state.items() if name.endswith("num_batches_tracked"))
    centers, momentum = content.class_centers.double(), content.centers_momentum.double()
    for step, rate in zip(steps, rates):
        rows = content.drawn_classes(step)  # the others wait
        momentum[rows] = 0.9 * momentum[rows] + script.WEIGHT_DECAY * centers[rows]
        centers[rows] -= rate * momentum[rows]
    assert_moved_to(torch.load(run / "fc.pth")["arc_face_state_dict"]["weight"], centers, content.class_centers)

    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert lines[: script.STEP] == (old.root / "stage1" / "metrics.jsonl").read_text().splitlines()[: script.STEP]
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, script.STEPS + 1))  # 7 and half of 8 were there
    assert [record["lr"] for record in records[script.STEP :]] == pytest.approx(rates)
    shown = json_lines(run / "samples_rank0.jsonl")
    assert shown[: script.STEP] == json_lines(old.root / "stage1" / "samples_rank0.jsonl")[: script.STEP]
    assert shown[script.STEP :] == [{"step": step, "images": content.images(step)} for step in steps]
    # The half one of step 7 is gone. Epoch 1 is the best: the losses of steps 5 and 6 count in the mean of epoch 2.
    assert max(record["loss"] for record in records[script.STEP :]) < script.STAGE1_LOSSES[0]
    assert sorted(path.name for path in (run / "checkpoints").glob("step*")) == ["step00000004", "step00000008"]


def test_stage_2_goes_on_from_its_checkpoint_and_its_cache(old, tmp_path, fork_ranks):
    """On one rank: Adam, the rate of ReduceLROnPlateau, the net's statistics, and features in both orientations."""
    run, cache, content, script = tmp_path / "run", tmp_path / "cache", old.content, old.script
    shutil.copytree(old.root / "stage2", run)
    shutil.copytree(old.root / "cache_bf16", cache)
    more = [*NO_GRADIENTS, "--feature_cache", cache, "--published_checkpoints"]
    status, output = fork_ranks(0, *flags(old, "stage2"), "--output_dir", run, "--resume", *more)
    assert status == 0, output
    assert "resumed at step 6 (epoch 2), written by 2 ranks with ZeRO 2" in output
    assert "frozen backbone" not in output  # it has nothing to compute
    assert "--slope bounded: the run goes on with exact" in output  # there was no other, and is no flag for it
    assert "starts at" not in output and "is lowered" not in output
    assert yaml.safe_load((run / "config.yaml").read_text())["config"]["slope"] == "exact"
    state = json.loads((run / "checkpoints" / "step00000008" / "state.json").read_text())
    assert (state["slope"], state["objective"], "limit" in state["schedule"]) == ("exact", ["scf"], False)

    updates = script.STEP - script.SKIPPED
    weights = {name: value.double() for name, value in script.trained(content.net).items()}
    moments = {name: (content.exp_avg[name].double(), content.exp_avg_sq[name].double()) for name in weights}
    steps, rates = (script.STEP + 1, script.STEPS), (script.REDUCED_LR, script.REDUCED_LR / 10)
    net, seen = confidence_net(content.net), []
    for step, rate in zip(steps, rates):
        images, mirrored = content.images(step), content.mirrored(step)
        maps = content.maps[images, mirrored].bfloat16().float()
        centers = content.class_centers[content.records.labels[images]]
        cosine = F.cosine_similarity(content.features[images, mirrored], centers).mean()
        seen.append({"step": step, "kappa": kappa_of(net, maps).mean().item(), "cos_theta": cosine.item(), "lr": rate})
        updates += 1
        for name, value in weights.items():
            weights[name], *moments[name] = adam_step(value, *moments[name], updates, rate, script.WEIGHT_DECAY)
        net.load_state_dict(weights, strict=False)
    records = json_lines(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, script.STEPS + 1))
    for record, expected in zip(records[script.STEP :], seen):
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    shown = json_lines(run / "samples_rank0.jsonl")[script.STEP :]
    assert shown == [{"step": step, "images": content.images(step)} for step in steps]

    progress = {"epoch": 1, "global_step": script.STEPS - 1}
    confidence = torch.load(run / "confidence.pth")
    assert_has(confidence, progress)
    state = confidence["uncer_net_state_dict"]
    for name, expected in weights.items():
        assert_moved_to(state[name], expected, content.net[name])
    torch.testing.assert_close(state, dict(net.state_dict()), rtol=1e-4, atol=1e-6)  # the statistics, too
    model = torch.load(run / "scf_model.pt")
    assert_same_bits(model["backbone_state_dict"], content.backbone)
    assert_same_bits(model["uncer_net_state_dict"], state)
    facts = {"radius": script.RADIUS, "normalization": script.NORMALIZATION, "normalizer": "exact"}
    assert_has(model, {**facts, **progress})
    published = torch.load(run / "ckpts" / "ckpt_e2.pt")["opt_state"]
    assert published["param_groups"][0]["lr"] == pytest.approx(rates[-1])
    for (name, expected), found in zip(moments.items(), published["state"].values(), strict=True):
        assert found["step"] == script.STEPS - script.SKIPPED
        for key, value in zip(("exp_avg", "exp_avg_sq"), expected):
            bound = 1e-6 * value.abs().max().item()  # decay and moment may cancel
            torch.testing.assert_close(found[key].double(), value, rtol=1e-5, atol=bound, msg=f"{key} of {name}")
    assert_same_records(cache, old.root / "cache_bf16")


def test_stage_2_starts_from_old_weights_and_an_old_cache(old, tmp_path, fork_ranks):
    cache, run, content = tmp_path / "cache", tmp_path / "run", old.content
    shutil.copytree(old.root / "cache_int8", cache)
    more = ["--max_steps", 1, "--feature_cache", cache, "--cache_dtype", "int8"]
    status, output = fork_ranks(0, *flags(old, "stage2"), "--output_dir", run, *more)
    assert status == 0, output
    assert "pixels: insightface, as noted in --saved_fc" in output
    assert "frozen backbone" not in output
    images, mirrored = content.images(1), content.mirrored(1)
    centers = content.class_centers[content.records.labels[images]]
    cosine = F.cosine_similarity(content.features[images, mirrored], centers).mean().item()
    assert json_lines(run / "metrics.jsonl")[0]["cos_theta"] == pytest.approx(cosine, rel=1e-5)
    assert_same_bits(torch.load(run / "scf_model.pt")["backbone_state_dict"], content.backbone)
    assert_same_records(cache, old.root / "cache_int8")
    status, output = fork_ranks(0, "verify", cache, module="scf_fast.feature_cache")
    assert status == 0 and "128 intact records, 0 damaged" in output, output


def test_an_old_model_embeds_images(old, tmp_path, fork_ranks):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 14, 14, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for number, face in enumerate(pixels):
        Image.fromarray(face).save(tmp_path / f"{number}.png")
    out, faces = tmp_path / "out.npz", sorted(tmp_path.glob("*.png"))
    more = ["--model", old.root / "stage2" / "scf_model.pt", "--out", out, "--loader", "torch", "--num-workers", 0]
    status, output = fork_ranks(0, *faces, *more, module="scf_fast.embed")
    assert status == 0, output
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() - 127.5) / 127.5
    with torch.no_grad():
        features, maps = features_and_map(old.content.backbone, images)
        kappa = kappa_of(confidence_net(old.content.net).double().eval(), maps)
    with np.load(out) as found:
        np.testing.assert_allclose(found["mu"], F.normalize(features), atol=1e-5)
        np.testing.assert_allclose(found["kappa"], kappa, rtol=1e-4)


def pair_losses(cosine, first, second, radius):
    """PFE-G and PFE-v of pairs, (P,) float64, from their cosines and each one's (variance, kappa)."""
    dim = 32
    variance = first[0] + second[0]
    gaussian = (1 - cosine) / variance + dim / 2 * (variance.log() + math.log(2 * math.pi))

    def log_normalizer(kappa):
        log_bessel = torch.from_numpy(np.log(ive(dim / 2 - 1, kappa.numpy()))) + kappa
        return (dim / 2 - 1) * kappa.log() - dim / 2 * math.log(2 * math.pi) - log_bessel

    of_sum = (first[1] ** 2 + second[1] ** 2 + 2 * first[1] * second[1] * cosine).sqrt()
    scores = log_normalizer(first[1]) + log_normalizer(second[1]) - log_normalizer(of_sum)
    return gaussian, dim * math.log(radius) - scores


def test_two_objectives_of_pairs_go_on(old, pairs, tmp_path, fork_ranks):
    """On one rank: groups of a person, the lowered rate, Adam's count, and a folder for each net."""
    run, cache, content, script, first = tmp_path / "run", tmp_path / "cache", pairs.content, pairs.script, old.script
    shutil.copytree(pairs.folder, run)
    shutil.copytree(old.root / "cache_bf16", cache)
    weights = ["--saved_bkb", old.root / "stage1" / "backbone.pth", "--feature_cache", cache]
    more = [*weights, *first.COMMON_FLAGS, "--data", old.root / "data", *NO_GRADIENTS]
    status, output = fork_ranks(0, *script.FLAGS, *more, "--output_dir", run, "--resume")
    assert status == 0, output
    assert "resumed at step 6 (epoch 2), written by 2 ranks with ZeRO 2" in output
    assert "starts at" not in output and "is lowered" not in output and "goes on with" not in output

    updates, rate = first.STEP - first.SKIPPED, script.LIMIT * script.GAMMA
    state = {name: value.double() for name, value in first.trained(content.net).items()}
    moments = {name: (content.exp_avg[name].double(), content.exp_avg_sq[name].double()) for name in state}
    nets = {name: confidence_net(net) for name, net in content.nets.items()}
    expected = []
    for step in (first.STEP + 1, first.STEPS):
        images, mirrored = content.images(step), content.mirrored(step)
        maps = content.maps[images, mirrored].bfloat16().float()
        with torch.no_grad():
            variance, kappa = (kappa_of(nets[name], maps).double() for name in script.OBJECTIVES)
        groups = torch.arange(len(images)) // script.IMAGES
        one, other = torch.triu_indices(len(images), len(images), 1)
        one, other = one[groups[one] == groups[other]], other[groups[one] == groups[other]]
        mu = F.normalize(content.features[images, mirrored].double())
        cosine = (mu[one] * mu[other]).sum(1)
        parameters = [(variance[rows], kappa[rows]) for rows in (one, other)]
        of_pfe, of_pfe_vmf = (losses.mean().item() for losses in pair_losses(cosine, *parameters, first.RADIUS))
        seen = {"pfe/total_loss": of_pfe, "pfe_vmf/total_loss": of_pfe_vmf, "total_loss": of_pfe + of_pfe_vmf}
        seen |= {"pfe/variance": variance.mean().item(), "pfe_vmf/kappa": kappa.mean().item()}
        expected.append({**seen, "pfe/pair_cos": cosine.mean().item(), "pfe/pairs": len(one), "lr": rate})
        updates += 1
        for name, value in state.items():
            state[name], *moments[name] = adam_step(value, *moments[name], updates, rate, first.WEIGHT_DECAY)
        for name, net in nets.items():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            net.load_state_dict(own, strict=False)
    records = json_lines(run / "metrics.jsonl")[first.STEP :]
    for record, values in zip(records, expected, strict=True):
        assert {key: record[key] for key in values} == pytest.approx(values, rel=1e-4)
    shown = json_lines(run / "samples_rank0.jsonl")[first.STEP :]
    assert [record["images"] for record in shown] == [content.images(step) for step in (7, 8)]
    progress = {"epoch": 1, "global_step": first.STEPS - 1}
    for name, net in nets.items():
        confidence, model = (torch.load(run / name / file) for file in ("confidence.pth", "scf_model.pt"))
        assert_has(confidence, {**progress, "objective": name})
        assert_has(model, {**progress, "objective": name, "radius": first.RADIUS})
        assert_same_bits(model["uncer_net_state_dict"], confidence["uncer_net_state_dict"])
        for key, before in first.trained(content.nets[name]).items():
            assert_moved_to(confidence["uncer_net_state_dict"][key], state[f"{name}.{key}"], before)
        torch.testing.assert_close(confidence["uncer_net_state_dict"], dict(net.state_dict()), rtol=1e-4, atol=1e-6)
    saved = json.loads((run / "checkpoints" / "step00000008" / "state.json").read_text())
    assert_has(saved, {"objective": [*script.OBJECTIVES], "schedule": {"limit": script.LIMIT}, "slope": "bounded"})
    losses = [values["total_loss"] for values in expected]
    assert saved["metric"] == pytest.approx((script.LOSSES + sum(losses)) / 4, rel=1e-4)  # of the whole epoch


def test_an_old_model_keeps_its_objective(pairs):
    for name in pairs.script.OBJECTIVES:
        assert SCF.from_checkpoint(pairs.folder / name).objective is Objective(name)
