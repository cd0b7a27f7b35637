import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scf_fast.backbones import BACKBONES, Backbone, identify_backbone


class PublishedUnit(nn.Module):
    """The published IR unit, rebuilt from its description: names shortcut_layer and res_layer, max pool of size 1 where widths agree."""

    def __init__(self, i, o, stride, se):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if i == o else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        parts = [nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.PReLU(o), nn.Conv2d(o, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)]
        if se:
            gate = nn.Module()
            gate.fc1, gate.fc2 = nn.Conv2d(o, o // 16, 1, bias=False), nn.Conv2d(o // 16, o, 1, bias=False)
            parts.append(gate)
        self.res_layer, self.se = nn.Sequential(*parts), se

    def forward(self, x):
        y = self.res_layer[:5](x) if self.se else self.res_layer(x)
        if self.se:
            gate = self.res_layer[5]
            y = y * torch.sigmoid(gate.fc2(torch.relu(gate.fc1(y.mean((2, 3), keepdim=True)))))
        return y + self.shortcut_layer(x)


class Published(nn.Module):
    def __init__(self, units, se):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        body, i = [], 64
        for o, n in zip((64, 128, 256, 512), units):
            for k in range(n):
                body.append(PublishedUnit(i, o, 2 if k == 0 else 1, se))
                i = o
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512, affine=False))

    def forward(self, x):
        convf = self.body(self.input_layer(x))
        return self.output_layer(convf), convf.flatten(1)


@pytest.mark.parametrize("name, units, se", [("ir_50", (3, 4, 14, 3), False), ("ir_se_50", (3, 4, 14, 3), True)])
def test_same_outputs_as_the_published_network_with_its_weights(name, units, se):
    torch.manual_seed(0)
    theirs, ours = Published(units, se).eval(), Backbone(name).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        (features, convf), (ours_features, ours_convf) = theirs(images), ours(images)
    torch.testing.assert_close(ours_features, features, rtol=1e-5, atol=1e-5 * features.abs().max().item())
    torch.testing.assert_close(ours_convf.flatten(1), convf, rtol=1e-5, atol=1e-5 * convf.abs().max().item())


@pytest.mark.parametrize("name, units", [("ir_100", (3, 13, 30, 3)), ("ir_152", (3, 8, 36, 3))])
def test_published_parameter_names(name, units):
    with torch.device("meta"):
        theirs, ours = Published(units, False).state_dict(), Backbone(name).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_ir_100_has_the_published_size_and_cost():
    with torch.device("meta"):
        model = Backbone("ir_100").eval()
        with FlopCounterMode(display=False) as counter:
            features, convf = model(torch.zeros(1, 3, 112, 112))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 65.1
    assert round(counter.get_total_flops() / 1e9, 2) == 24.15
    assert features.shape == (1, 512) and convf.shape == (1, 512, 7, 7)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_architecture_is_identified_by_its_weights(name):
    with torch.device("meta"):
        model = Backbone(name, z_dim=64)
        _, convf = model.eval()(torch.zeros(1, 3, 112, 112))
    assert identify_backbone(model.state_dict()) == (name, 64)
    assert convf.flatten(1).shape[1] == BACKBONES[name].convf_dim


def test_unknown_weights_name_the_nearest_architecture():
    with torch.device("meta"):
        state = Backbone("ir_50").state_dict()
    del state["body.3.res_layer.0.weight"]
    with pytest.raises(ValueError, match=r"nearest is ir_50: 1 missing \(e.g. body.3.res_layer.0.weight\)"):
        identify_backbone(state)
    with pytest.raises(ValueError, match=r"no backbone: must have 'output_layer.3.weight'"):
        identify_backbone({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="network must be one of"):
        Backbone("ir_18")
