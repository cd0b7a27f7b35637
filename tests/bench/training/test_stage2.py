"""The published way of stage 2 under its settings: where its gradient goes, and one TF32 rule for steps and epochs."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.published_scf_loss import published_scf_loss
from bench.training import stage2_epochs, throughput
from bench.training.stage2_steps import PUBLISHED, Z_DIM, make_backbone, make_head, published_step

OPTIONS = argparse.Namespace(confidence_net="mlp", epoch_batch=4)
THROUGH = PUBLISHED["published, backward through the backbone"]


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("ir_tiny")


def make_batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 112, 112, generator=generator)
    return images, torch.tensor([0, 1, 2, 1]), torch.randn(3, Z_DIM, generator=generator)


def gradients_in(step, backbone, images, labels):
    """Returns the gradients that the backbone's weights get in a step."""
    found = {}
    handles = []
    for name, weight in backbone.named_parameters():
        weight.requires_grad_(True)  # a hook needs it
        handles.append(weight.register_hook(lambda gradient, name=name: found.__setitem__(name, gradient.clone())))
        weight.requires_grad_(False)
    step(images, labels)
    for handle in handles:
        handle.remove()
    return found


def test_the_gradient_goes_through_the_backbone_where_the_setting_says_so(backbone):
    """Against the gradient of the loss, written out; afterwards the backbone is as frozen as before."""
    images, labels, centers = make_batch()
    weights = dict(backbone.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    backbone.requires_grad_(True)
    features, convf = backbone(images)
    log_kappa = make_head(OPTIONS, backbone.architecture)(convf)
    loss = published_scf_loss(features, log_kappa, 64.0 * F.normalize(centers), labels).loss.mean()
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    backbone.requires_grad_(False)

    found = gradients_in(published_step(OPTIONS, backbone, centers, THROUGH), backbone, images, labels)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert next(iter(expected.values())).abs().max() > 1e-3  # of the first convolution
    assert gradients_in(published_step(OPTIONS, backbone, centers), backbone, images, labels) == {}
    for name, weight in weights.items():
        assert not weight.requires_grad and weight.grad is None and torch.equal(weight, before[name])


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


class Spy(torch.nn.Module):
    """A backbone that notes under which rule it runs, forward and backward."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.architecture, self.seen = backbone, backbone.architecture, []

    def forward(self, images):
        features, convf = self.backbone(images)
        self.seen.append(flags())
        if features.requires_grad:
            features.register_hook(lambda gradient: self.seen.append(flags()))
        return features, convf


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("way", list(PUBLISHED))
def test_steps_and_epochs_have_the_rule_of_their_setting_whatever_the_process_has(way, process, backbone, monkeypatch):
    """PyTorch begins with TF32 in convolutions, and the start of a process group ends it."""
    images, labels, centers = make_batch()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", process)
    before, rule, spy = flags(), PUBLISHED[way].tf32, Spy(backbone)
    published_step(OPTIONS, spy, centers, PUBLISHED[way])(images, labels)
    batches = [SimpleNamespace(images=images, labels=labels)]
    loader = SimpleNamespace(batches=lambda number: batches, close=lambda: None)
    monkeypatch.setattr(stage2_epochs, "make_loader", lambda *_, **__: loader)

    class Source(list):
        num_classes = 3

    epoch, _ = stage2_epochs.published_epoch(OPTIONS, Source(range(4)), spy, PUBLISHED[way])
    epoch(0)
    assert spy.seen == [(rule, rule)] * (4 if PUBLISHED[way].through_backbone else 2)
    assert flags() == before


def test_the_file_has_the_rule_and_our_own_steps_have_it_from_the_first_one_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(throughput, "is_installed", lambda module: False)

    def measure_steps(options, backbone, batch):
        seen.append(flags())
        return {way: [1.0] for way in ("published", "ours")}

    monkeypatch.setattr(throughput, "measure_steps", measure_steps)
    assert throughput.main(["--networks", "ir_tiny", "--batches", "4", "--out", str(tmp_path)]) == 0
    assert seen == [(False, False)]
    content = json.loads((tmp_path / "throughput-ir_tiny-conv.json").read_text())
    assert content["published"]["published"] == {"autocast": False, "tf32": False, "through_backbone": False}
    assert [way for way, setting in content["published"].items() if setting["tf32"]] == ["published, TF32"]
