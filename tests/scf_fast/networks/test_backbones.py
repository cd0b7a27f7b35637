import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scf_fast.networks.backbones import BACKBONES, FAMILIES, Backbone, IRUnit
from scf_fast.weights.family_names import family_state, identify_backbone, native_state


class Gate(nn.Module):
    """Squeeze and excitation as the published code and TFace have it; both name the two convolutions fc1 and fc2."""

    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Conv2d(channels, channels // 16, 1, bias=False),
            nn.Conv2d(channels // 16, channels, 1, bias=False),
        )

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Unit(nn.Module):
    """The IR unit of the published code and, with a BatchNorm in the middle and another name for the gate, of TFace."""

    def __init__(self, i, o, stride, se, tface):
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if i == o
            else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        )
        middle = [nn.BatchNorm2d(o)] if tface else []
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(i),
            nn.Conv2d(i, o, 3, 1, 1, bias=False),
            *middle,
            nn.PReLU(o),
            nn.Conv2d(o, o, 3, stride, 1, bias=False),
            nn.BatchNorm2d(o),
        )
        if se:
            self.res_layer.add_module("se_block" if tface else "5", Gate(o))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IRNet(nn.Module):
    """IR_50 ... of the published code and of TFace."""

    def __init__(self, units, se=False, tface=False):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        body, i = [], 64
        for o, n in zip((64, 128, 256, 512), units):
            for k in range(n):
                body.append(Unit(i, o, 2 if k == 0 else 1, se, tface))
                i = o
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(512 * 49, 512),
            nn.BatchNorm1d(512, affine=False),
        )

    def forward(self, x):
        convf = self.body(self.input_layer(x))
        return self.output_layer(convf), convf


class IBlock(nn.Module):
    """The block of insightface's iresnets."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1, self.conv1, self.bn2 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.prelu, self.conv2, self.bn3 = nn.PReLU(o), nn.Conv2d(o, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.downsample = (
            nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride != 1 else nn.Identity()
        )

    def forward(self, x):
        return self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))) + self.downsample(x)


class IResNet(nn.Module):
    """iresnet18 ... of insightface."""

    def __init__(self, units):
        super().__init__()
        self.conv1, self.bn1, self.prelu = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        i = 64
        for stage, (o, n) in enumerate(zip((64, 128, 256, 512), units), 1):
            blocks = [IBlock(i if k == 0 else o, o, 2 if k == 0 else 1) for k in range(n)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            i = o
        self.bn2, self.fc, self.features = nn.BatchNorm2d(512), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512)

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        convf = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(convf).flatten(1))), convf


ORIGINALS = {
    "ir_50": lambda: IRNet((3, 4, 14, 3)),
    "ir_100": lambda: IRNet((3, 13, 30, 3)),
    "ir_152": lambda: IRNet((3, 8, 36, 3)),
    "ir_se_50": lambda: IRNet((3, 4, 14, 3), se=True),
    "ir_se_100": lambda: IRNet((3, 13, 30, 3), se=True),
    "tface_ir_18": lambda: IRNet((2, 2, 2, 2), tface=True),
    "tface_ir_34": lambda: IRNet((3, 4, 6, 3), tface=True),
    "tface_ir_50": lambda: IRNet((3, 4, 14, 3), tface=True),
    "tface_ir_101": lambda: IRNet((3, 13, 30, 3), tface=True),
    "tface_ir_se_50": lambda: IRNet((3, 4, 14, 3), se=True, tface=True),
    "tface_ir_se_101": lambda: IRNet((3, 13, 30, 3), se=True, tface=True),
    "iresnet18": lambda: IResNet((2, 2, 2, 2)),
    "iresnet34": lambda: IResNet((3, 4, 6, 3)),
    "iresnet50": lambda: IResNet((3, 4, 14, 3)),
    "iresnet100": lambda: IResNet((3, 13, 30, 3)),
    "iresnet200": lambda: IResNet((6, 26, 60, 6)),
}


@pytest.mark.parametrize("name", list(ORIGINALS))
def test_weights_of_the_original_are_recognized_and_renamed_one_to_one(name):
    with torch.device("meta"):
        theirs, ours = ORIGINALS[name]().state_dict(), Backbone(name).state_dict()
    assert identify_backbone(theirs) == (name, 512)
    renamed = native_state(theirs)
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in ours.items()}
    assert list(family_state(renamed, BACKBONES[name])) == list(theirs)


@pytest.mark.parametrize("name", ["ir_50", "ir_se_50", "tface_ir_18", "tface_ir_se_50", "iresnet18", "iresnet34"])
def test_same_outputs_as_the_original_network_with_its_weights(name):
    torch.manual_seed(0)
    theirs = ORIGINALS[name]().eval()
    with torch.device("meta"):
        ours = Backbone(name).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    ours.load_state_dict(native_state(theirs.state_dict()), strict=True, assign=True)
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        (features, convf), (ours_features, ours_convf) = theirs(images), ours(images)
    torch.testing.assert_close(ours_features, features, rtol=1e-5, atol=1e-5 * features.abs().max().item())
    torch.testing.assert_close(ours_convf, convf, rtol=1e-5, atol=1e-5 * convf.abs().max().item())


@pytest.mark.parametrize(
    "name, convolution, linear, dropout",
    [
        ("ir_small", (2 / (9 * 16)) ** 0.5, (2 / 32) ** 0.5, 0.4),
        ("iresnet_small", 0.1, (1 / (3 * 128 * 49)) ** 0.5, 0.0),
    ],
)
def test_initialization_and_dropout_of_each_family(name, convolution, linear, dropout):
    torch.manual_seed(0)
    net = Backbone(name, z_dim=32)
    assert net.body[0].res_layer[1].weight.std().item() == pytest.approx(convolution, rel=0.1)
    assert net.output_layer[3].weight.std().item() == pytest.approx(linear, rel=0.1)
    assert net.output_layer[1].p == dropout and Backbone(name, 32, dropout=0.25).output_layer[1].p == 0.25
    trained = {key for key, parameter in net.named_parameters() if parameter.requires_grad}
    assert ("output_layer.4.weight" in trained, "output_layer.4.bias" in trained) == (False, name == "iresnet_small")


@pytest.mark.parametrize("name", ["ir_small", "ir_se_small", "iresnet_small"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shortcuts_have_the_bits_of_the_published_pooling(name, layout):
    """Outputs and all gradients, with units of both strides; and the pooling, as the published code has it."""
    torch.manual_seed(0)
    ours = Backbone(name, 8, dropout=0.0)
    theirs = copy.deepcopy(ours)
    strides = set()
    for unit in theirs.body:
        if not isinstance(unit.shortcut_layer, nn.Sequential):
            strides.add(unit.stride)
            unit.shortcut_layer = nn.MaxPool2d(1, unit.stride)
    assert 1 in strides
    images = torch.randn(3, 3, 112, 112).to(memory_format=layout)
    results = []
    for net in (ours, theirs):
        x = images.clone().requires_grad_()
        features, convf = net(x)
        (features.square().sum() + convf.sin().sum()).backward()
        results.append([features, convf, x.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
        assert convf.is_contiguous(memory_format=layout)
    assert all(map(torch.equal, *results))


def test_strided_shortcut_has_the_bits_of_the_published_pooling():
    torch.manual_seed(0)
    ours = IRUnit(8, 8, 2, FAMILIES["published"], squeeze_excitation=False)
    theirs = copy.deepcopy(ours)
    theirs.shortcut_layer = nn.MaxPool2d(1, 2)
    for size in (14, 7):
        x = torch.randn(3, 8, size, size).to(memory_format=torch.channels_last)
        results = []
        for unit in (ours, theirs):
            given = x.clone().requires_grad_()
            y = unit(given)
            y.sin().sum().backward()
            results.append([y, given.grad])
            assert y.is_contiguous(memory_format=torch.channels_last)
        assert all(map(torch.equal, *results))


def saved_bytes(net, *shape):
    """Bytes that autograd keeps of a forward pass, weights excepted."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = net(torch.randn(*shape, requires_grad=True))
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_unit_keeps_its_maps_for_the_backward_pass_and_nothing_else(stride):
    """The inputs of BN, convolution, PReLU, convolution and BN; an index of each value would be two maps more."""
    unit = IRUnit(16, 16, stride, FAMILIES["published"], squeeze_excitation=False)
    kept = saved_bytes(unit, 4, 16, 28, 28)
    maps = 4 + 1 / stride**2
    assert maps <= kept / (4 * 4 * 16 * 28 * 28) < maps + 0.02


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
    z_dim = 512 if name in ORIGINALS else 64  # for 512 the expected shapes are at hand
    with torch.device("meta"):
        model = Backbone(name, z_dim)
        _, convf = model.eval()(torch.zeros(1, 3, 112, 112))
    assert identify_backbone(model.state_dict()) == (name, z_dim)
    assert identify_backbone(family_state(model.state_dict(), BACKBONES[name])) == (name, z_dim)
    assert convf.flatten(1).shape[1] == BACKBONES[name].convf_dim


def test_unknown_weights_name_the_nearest_architecture_in_the_words_of_the_file():
    with torch.device("meta"):
        state, theirs = Backbone("ir_50").state_dict(), IResNet((3, 4, 14, 3)).state_dict()
    del state["body.3.res_layer.0.weight"]
    state["body.0.res_layer.1.weight"] = torch.zeros(1)
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="nearest is ir_50") as error:
        identify_backbone(state)
    assert str(error.value).endswith(
        "1 missing (body.3.res_layer.0.weight); 1 unexpected (extra); 1 misshaped (body.0.res_layer.1.weight)"
    )
    for key in [key for key in theirs if key.startswith("layer3.4.bn")]:
        del theirs[key]
    with pytest.raises(ValueError, match="nearest is iresnet50") as error:
        identify_backbone(theirs)
    assert str(error.value).endswith(
        "15 missing (layer3.4.bn1.bias, layer3.4.bn1.num_batches_tracked, layer3.4.bn1.running_mean, ...)"
    )
    with pytest.raises(ValueError, match=r"no backbone: must have 'output_layer.3.weight'"):
        identify_backbone({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="network must be one of"):
        Backbone("ir_18")
