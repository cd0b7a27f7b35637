import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.networks import frozen
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.frozen import FoldedBackbone, FoldedConv, FrozenBackbone, frozen_precisions


def lively(module, seed=0):
    """BatchNorms with statistics and weights far from the identity, so that a wrong fold cannot pass."""
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            m.running_mean.normal_(std=0.5)
            m.running_var.uniform_(0.5, 2.0)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.5)
        if isinstance(m, nn.PReLU):
            nn.init.uniform_(m.weight, 0.0, 0.5)
    return module.eval()


@pytest.fixture(params=["ir_small", "ir_se_small"])
def backbone(request):
    return lively(Backbone(request.param, 32))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("after", [True, False])
def test_batchnorm_before_a_padded_convolution_folds_exactly_at_the_border(stride, after):
    norms = lively(nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(5)])).double()
    conv = nn.Conv2d(3, 5, 3, stride, 1, bias=False).double()
    folded = FoldedConv(norms[0], conv, norms[1] if after else None, 9).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(norms[0](x))
        expected = norms[1](expected) if after else expected
        torch.testing.assert_close(folded(x), expected, rtol=0, atol=2e-6)  # the folded weights are rounded to float32
    assert (
        folded.rest[0, :, 0, 0] - folded.rest[0, :, 4 // stride, 4 // stride]
    ).abs().max() > 1e-3  # the border does differ


def test_folded_in_float32_equals_the_model(backbone):
    images = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        expected, expected_map = backbone(images)
        features, convf = FoldedBackbone(backbone)(images)
    assert ((convf - expected_map).norm() / expected_map.norm()).item() < 1e-5
    assert F.cosine_similarity(features, expected).min().item() > 1 - 1e-6
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_full_size_architecture_folds():
    backbone = lively(Backbone("ir_50"))
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected, expected_map = backbone(images)
        features, convf = FoldedBackbone(backbone)(images.to(memory_format=torch.channels_last))
    assert ((convf - expected_map).norm() / expected_map.norm()).item() < 1e-5
    assert F.cosine_similarity(features, expected).item() > 1 - 1e-6
    assert convf.is_contiguous(memory_format=torch.channels_last)


def test_first_batch_decides_the_precision_and_the_log_says_so(backbone, caplog, monkeypatch):
    monkeypatch.setitem(frozen.MAX_CONVF_ERROR, "bf16", 1e-6)
    network = FrozenBackbone(backbone, "cpu", ("bf16", "fp32"))
    with caplog.at_level(logging.INFO):
        _, convf = network(torch.randn(2, 3, 112, 112))
    assert network.dtype == convf.dtype == torch.float32
    assert "bf16 refused, not accurate enough" in caplog.text and "fp32 taken" in caplog.text


def test_bf16_stays_close(backbone, monkeypatch):
    monkeypatch.setitem(frozen.MAX_CONVF_ERROR, "bf16", 3e-2)  # random weights lose more than trained ones
    monkeypatch.setattr(frozen, "MIN_COSINE", 0.999)
    network = FrozenBackbone(backbone, "cpu", ("bf16",))
    images = torch.randn(4, 3, 112, 112)
    features, convf = network(images)
    assert features.dtype == torch.float32 and convf.dtype == torch.bfloat16
    with torch.no_grad():
        expected, _ = backbone(images)
    assert F.cosine_similarity(features.float(), expected).min().item() > 0.999


def test_damaged_weights_are_an_error(backbone):
    backbone.output_layer[3].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="differs from the float32 model in every precision of fp32"):
        FrozenBackbone(backbone, "cpu", ("fp32",))(torch.randn(2, 3, 112, 112))


def test_order_of_precisions(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert frozen_precisions("auto", cuda) == ("fp16", "bf16", "fp32")
    assert frozen_precisions("bf16", cuda) == ("bf16", "fp32")
    assert frozen_precisions("fp32", cpu) == ("fp32",)
    assert frozen_precisions("auto", cpu)[-1] == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert frozen_precisions("auto", cuda) == ("fp16", "bf16", "fp32")  # as a rank on another GPU
    with pytest.raises(ValueError, match=r"Tesla V100 with 7\.0, which would emulate"):
        frozen_precisions("bf16", cuda)


class Compiled(nn.Module):
    """Stands in for torch.compile: the network as it is, and the batch sizes that it was asked for."""

    def __init__(self, network, **_):
        super().__init__()
        self.network, self.sizes = network, []

    def forward(self, images):
        assert images.is_contiguous(memory_format=torch.channels_last)
        self.sizes.append(len(images))
        return self.network(images)


def test_few_batch_sizes_are_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled)
    network = lively(Backbone("ir_tiny", 8))
    compiled, plain = (FrozenBackbone(network, "cpu", compile=compile) for compile in (True, False))
    images = torch.randn(9, 3, 112, 112)
    for count in (9, 1, 2, 3, 4, 7, 8, 0):
        for ours, theirs in zip(compiled(images[:count]), plain(images[:count]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert compiled._call.sizes == [9, 3, 3, 3, 6, 9, 9]  # none for an empty batch
    beforehand = FrozenBackbone(network, "cpu", compile=True, batch_size=9)
    beforehand(images[:2]), beforehand(images[:5])
    assert beforehand._call.sizes == [3, 6]
    finer = FrozenBackbone(network, "cpu", compile=True, batch_size=9, batch_sizes=8)
    finer(images[:3]), finer(images[:5])
    assert finer._call.sizes == [4, 6]


def test_float32_is_no_tf32(monkeypatch):
    seen = []
    convolve = F.conv2d
    monkeypatch.setattr(
        F, "conv2d", lambda *arguments: (seen.append(torch.backends.cudnn.allow_tf32), convolve(*arguments))[1]
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    network = FrozenBackbone(lively(Backbone("ir_tiny", 8)))
    network(torch.randn(2, 3, 112, 112))
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


def test_cudnn_measures_its_algorithms_once_the_precision_is_chosen(monkeypatch):
    """And only there: the setting of everything else stays, and ranks that choose a precision come to the same bits."""
    seen = []
    forward = FoldedBackbone.forward

    def noted(network, images):
        seen.append(torch.backends.cudnn.benchmark)
        return forward(network, images)

    monkeypatch.setattr(FoldedBackbone, "forward", noted)
    network = FrozenBackbone(lively(Backbone("ir_tiny", 8)))
    images = torch.randn(2, 3, 112, 112)
    network.choose(images)
    assert seen == [False]
    network(images)
    assert seen == [False, True] and not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError):
        network(images[:, :1])
    assert not torch.backends.cudnn.benchmark
