import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scf_fast.kernels import scf_loss
from scf_fast.networks.confidence import DEFAULT_RADIUS, ConvConfidence, build_confidence_net, identify_confidence_net


def test_mlp_is_the_published_network():
    net = build_confidence_net("mlp", 8, 7)
    width = 8 * 49
    theirs = nn.Sequential(
        nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width // 4), nn.ReLU(), nn.Linear(width // 4, 1)
    )
    net.load_state_dict({f"_log_kappa.{k}": v for k, v in theirs.state_dict().items()}, strict=True)
    convf = torch.randn(5, 8, 7, 7)
    expected = torch.log(1e-6 + torch.exp(theirs(convf.view(5, -1)))).squeeze(1)
    torch.testing.assert_close(net(convf), expected, rtol=1e-5, atol=1e-6)
    assert identify_confidence_net(net.state_dict()) == ("mlp", 392, 1)


def test_published_mlp_size():
    with torch.device("meta"):
        net = build_confidence_net("mlp", 512, 7)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 393.4


def test_conv_has_tface_parameter_names_and_shapes():
    with torch.device("meta"):
        state = build_confidence_net("conv", 512, 7).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if "running" not in k and "num_batches" not in k}
    assert shapes == {
        "conv_.0.weight": (512, 512, 3, 3),
        "conv_.2.weight": (512, 512, 3, 3),
        "conv_.3.weight": (512,),
        "conv_.3.bias": (512,),
        "conv_.5.weight": (512, 512, 3, 3),
        "conv_.6.weight": (512,),
        "conv_.6.bias": (512,),
        "_log_kappa.0.weight": (256, 512),
        "_log_kappa.0.bias": (256,),
        "_log_kappa.2.weight": (128, 256),
        "_log_kappa.2.bias": (128,),
        "_log_kappa.4.weight": (1, 128),
        "_log_kappa.4.bias": (1,),
    }
    assert identify_confidence_net(state) == ("conv", 512, 1)
    assert build_confidence_net("conv", 16, 7)(torch.randn(3, 16, 7, 7)).shape == (3,)


@pytest.mark.parametrize("size", [7, 9])
def test_bf16_on_a_cpu_trains_the_same_convolution(size):
    torch.manual_seed(0)
    layer, x = ConvConfidence(16, 7).conv_[0], torch.randn(3, 16, size, size, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(3, 16, size - 2, size - 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(gradient)
    exact = [value.detach().to(torch.bfloat16).double().requires_grad_() for value in (x, layer.weight)]
    expected = F.conv2d(*exact)
    expected.backward(gradient.double())
    assert "Convolution" not in type(y.grad_fn).__name__
    for ours, theirs in ((y, expected), (x.grad, exact[0].grad), (layer.weight.grad, exact[1].grad)):
        assert (ours.double() - theirs).norm() < 4e-3 * theirs.norm()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("raw, kappa", [(-1000.0, 1e-6), (0.0, 1 + 1e-6), (100.0, math.exp(100.0))])
def test_floor_of_kappa_without_overflow(raw, kappa):
    net = build_confidence_net("mlp", 2, 7)
    nn.init.zeros_(net._log_kappa[-1].weight)
    nn.init.constant_(net._log_kappa[-1].bias, raw)
    assert net(torch.randn(1, 2, 7, 7)).item() == pytest.approx(math.log(kappa), rel=1e-6)


def test_initial_kappa():
    log_kappa = build_confidence_net("mlp", 4, 7, initial_kappa=500.0)(torch.zeros(1, 4, 7, 7))
    assert abs(log_kappa.item() - math.log(500.0)) < 0.2


def test_errors():
    with pytest.raises(ValueError, match="at least 7 x 7"):
        build_confidence_net("conv", 4, 4)
    with pytest.raises(ValueError, match="no confidence net"):
        identify_confidence_net({"a": torch.zeros(1)})


def test_the_default_radius_is_that_of_the_kernels():
    assert inspect.signature(scf_loss).parameters["radius"].default == DEFAULT_RADIUS


@pytest.mark.parametrize("net", ["mlp", "conv", "pfe"])
@pytest.mark.parametrize("outputs", [1, 24])
def test_the_shape_of_every_net_is_read_off_its_weights(net, outputs):
    built = build_confidence_net(net, 8, 7, 1e-3, outputs=outputs)
    inputs = 8 if net == "conv" else 8 * 49
    assert identify_confidence_net(built.state_dict()) == (net, inputs, outputs)
    result = built(torch.randn(3, 8, 7, 7))
    assert result.shape == ((3,) if outputs == 1 else (3, outputs)) and result.dtype == torch.float32


@pytest.mark.parametrize("outputs", [1, 24])
def test_pfe_net_is_the_published_module(outputs):
    """Of Shi and Jain: fc - BN - ReLU - fc - BN, a shared scale of 1e-4 and shift of -7, log(1e-6 + exp(.))."""
    torch.manual_seed(1)
    net, convf = build_confidence_net("pfe", 4, 7, outputs=outputs), torch.randn(6, 4, 7, 7)
    state = net.state_dict()
    hidden = convf.flatten(1).double() @ state["fc1.weight"].double().T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    raw = hidden.clamp(min=0) @ state["fc2.weight"].double().T
    raw = (raw - raw.mean(0)) / (raw.var(0, unbiased=False) + 1e-5).sqrt()
    expected = torch.log(1e-6 + torch.exp(1e-4 * raw - 7))
    expected = expected.squeeze(1) if outputs == 1 else expected
    torch.testing.assert_close(net(convf).double(), expected, rtol=1e-6, atol=1e-6)
    net.start_at(2e-3)
    torch.testing.assert_close(net(convf).exp(), torch.full_like(net(convf), 2e-3), rtol=2e-3, atol=0)
