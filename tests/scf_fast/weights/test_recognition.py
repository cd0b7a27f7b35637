"""Checkpoints as other programs leave them: prefixes, trainers, heads, averages, what stands beside the tensors."""

import argparse
import collections
import pathlib
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from scf_fast import SCF, checkpoints
from scf_fast.weights.family_names import family_state
from scf_fast.weights.files import load_tensor_file, save_torch_file
from scf_fast.weights.reading import read_weights


@pytest.fixture(scope="module", params=["published", "tface", "insightface"])
def network(request, small_backbone):
    """A backbone of each family, with its state_dict under the family's names."""
    net = small_backbone(request.param)
    return net, family_state(net.state_dict(), net.architecture)


@pytest.fixture(scope="module")
def one_network(small_backbone):
    """The same of one family."""
    net = small_backbone("insightface")
    return net, family_state(net.state_dict(), net.architecture)


CENTERS = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def without(state, leaf):
    return {key: value for key, value in state.items() if not key.endswith(leaf)}


def averaged(state):
    return {key: value + 1 for key, value in state.items()}


class Anything:
    """A class of a trainer that is not installed here."""

    def __init__(self):
        self.best = 1


PREFIXES = ["model.", "_orig_mod.", "encoder.", "features.module.", "module.module.", "module._orig_mod.", "a.b-c.d_e."]
LAYOUTS = {
    **{prefix: lambda state, prefix=prefix: prefixed(state, prefix) for prefix in PREFIXES},
    "compiled parts": lambda state: {key.replace(".", "._orig_mod.", 1): value for key, value in state.items()},
    "backbone, optimizer": lambda state: {
        "backbone": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(32, 32)}}, "param_groups": []},
        "optimizer_ema": {"exp_avg": {"output_layer.3.weight": torch.ones(2, 2)}},
    },
    "model, module": lambda state: {"model": {"module": state}, "iteration": 7},
    "Lightning": lambda state: {
        "epoch": 3,
        "global_step": 99,
        "pytorch-lightning_version": "1.3.0",
        "state_dict": prefixed(state, "model."),
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hyper_parameters": {"lr": 0.1},
    },
    "averaged alone": lambda state: {"state_dict_ema": prefixed(state, "module."), "n_averaged": torch.tensor(5)},
    "SWA": lambda state: {"n_averaged": torch.tensor(5), **prefixed(state, "module.")},
    "list": lambda state: [state, {"epoch": 3}],
    "FLOP counter": lambda state: {**state, "total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1)},
    "twice the same": lambda state: {"state_dict": state, "model": dict(state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_is_found_however_it_is_wrapped(layout, network, tmp_path):
    net, state = network
    torch.save(LAYOUTS[layout](state), tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")
    assert weights.parts == ("backbone",) and same(weights.backbone, net.state_dict())
    assert weights.network() == (net.name, 32)


def test_counters_of_batchnorm_are_completed(network, tmp_path):
    net, state = network
    torch.save(without(state, "num_batches_tracked"), tmp_path / "a.pt")
    expected = net.state_dict()
    for key in expected:
        if key.endswith("num_batches_tracked"):
            expected[key] = torch.tensor(0)
    weights = read_weights(tmp_path / "a.pt")
    assert same(weights.backbone, expected) and list(weights.backbone) == list(expected)
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    model = SCF.from_checkpoint(tmp_path / "a.pt", backbone_alone=True)
    with torch.no_grad():
        assert torch.equal(model(images)[0], torch.nn.functional.normalize(net(images)[0]))
    variance = next(key for key in state if key.endswith("running_var"))
    torch.save({key: value for key, value in state.items() if key != variance}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="1 missing"):  # of what is not a counter nothing is made up
        read_weights(tmp_path / "b.pt").network()


def test_half_precision_and_mixed_types_keep_their_bits(one_network, tmp_path):
    _, state = one_network
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": prefixed(half, "module.")}, tmp_path / "half.pt")
    weights = read_weights(tmp_path / "half.pt")
    assert {value.dtype for value in weights.backbone.values()} == {torch.float16, torch.int64}
    assert SCF.from_checkpoint(tmp_path / "half.pt", backbone_alone=True).backbone.output_layer[3].weight.dtype == (
        torch.float32
    )


HEADS = {
    "Lightning of AdaFace": lambda state: {
        "state_dict": {
            **prefixed(state, "model."),
            "head.kernel": CENTERS.T.contiguous(),
            **{f"head.{name}": torch.zeros(1) for name in ("t", "batch_mean", "batch_std")},
        }
    },
    "MagFace": lambda state: {
        "arch": "iresnet_small",
        "state_dict": {**prefixed(state, "module.features.module."), "module.fc.weight": CENTERS.T.contiguous()},
    },
    "two prefixes": lambda state: {**prefixed(state, "module.backbone."), "module.head.weight": CENTERS},
    "one class of its own": lambda state: {**state, "head.weight": CENTERS},
    "class centers of ours": lambda state: {**prefixed(state, "backbone."), "class_centers": CENTERS},
}


@pytest.mark.parametrize("layout", HEADS)
def test_class_centers_beside_a_backbone(layout, network, tmp_path):
    net, state = network
    torch.save(HEADS[layout](state), tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")
    assert same(weights.backbone, net.state_dict()) and torch.equal(weights.class_centers, CENTERS)
    assert weights.network() == (net.name, 32)


def test_of_several_backbones_one_is_chosen(one_network, tmp_path):
    net, state = one_network
    path = tmp_path / "a.pt"
    for content, entries in (
        (
            {"state_dict": state, "state_dict_ema": prefixed(averaged(state), "module.")},
            ("state_dict", "state_dict_ema"),
        ),
        ({"model": state, "ema": {"shadow": averaged(state)}}, ("model", "ema/shadow")),
        ({**prefixed(state, "module.net."), **prefixed(averaged(state), "module.net_ema.")}, ("net", "net_ema")),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError) as raised:
            read_weights(path, "--model")
        said = str(raised.value)
        assert f"in '{entries[0]}' and in '{entries[1]}'" in said or f"in '{entries[1]}' and in '{entries[0]}'" in said
        assert "choose one of them with FILE#" in said
        assert same(read_weights(f"{path}#{entries[0]}").backbone, net.state_dict())
        assert same(read_weights(f"{path}#{entries[1]}").backbone, averaged(net.state_dict()))
    with pytest.raises(ValueError, match="there is no entry 'other' in the file"):
        read_weights(f"{path}#other")
    (tmp_path / "b#c.pt").write_bytes(path.read_bytes())
    assert read_weights(f"{tmp_path}/b#c.pt#net").parts == ("backbone",)  # a name may hold such a mark


def test_what_training_programs_put_beside_the_tensors_does_no_harm(one_network, tmp_path):
    net, state = one_network
    counts = collections.defaultdict(list)
    counts["loss"].append(1.0)
    content = {
        "state_dict": state,
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("a")),
        "best_acc": np.float64(0.5),
        "history": np.arange(3),
        "counts": counts,
        "epoch": 4,
        "seen": {1, 2},
    }
    torch.save(content, tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")
    assert same(weights.backbone, net.state_dict()) and weights.facts.epoch == 4
    loaded = load_tensor_file(tmp_path / "a.pt", "file")
    assert dict(loaded["counts"]) == {"loss": [1.0]} and not isinstance(loaded["args"], argparse.Namespace)
    content["callback"] = Anything()
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"loading it would run .*Anything, and code from a checkpoint is never run"):
        read_weights(tmp_path / "a.pt")


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, exec, pathlib.Path.touch, collections.namedtuple, np.fromfile])
def test_nothing_in_a_checkpoint_is_run(function, tmp_path):
    marker = tmp_path / "ran"
    argument = {pathlib.Path.touch: marker}.get(function, f"open({str(marker)!r}, 'w')")
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Runs(function, argument)}, tmp_path / "a.pt")
    try:
        load_tensor_file(tmp_path / "a.pt", "file")
    except ValueError as error:
        assert "weights_only" not in str(error)
    assert not marker.exists()
    with pytest.raises(ValueError, match="a Python pickle; code in it is never run"):
        (tmp_path / "b.pt").write_bytes(pickle.dumps(Runs(function, argument)))
        load_tensor_file(tmp_path / "b.pt", "file")
    assert not marker.exists()


def test_tensors_that_share_memory_are_written_apart(one_network, tmp_path, capsys):
    """DeepSpeed's parameters are parts of one buffer, a rank's class centers rows of all of them."""
    _, state = one_network
    buffer = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    shared, end = {}, 0
    for key, value in state.items():
        shared[key] = value
        if value.is_floating_point():
            start, end = end, end + value.numel()
            shared[key] = buffer[start:end].view(value.shape)
    torch.save({"module": shared}, tmp_path / "a.pt")
    assert (
        checkpoints.main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors"), "--to", "safetensors"])
        == 0
    )
    assert same(safetensors.torch.load_file(tmp_path / "b.safetensors"), state)
    save_torch_file({"rows": {"weight": buffer[:10]}}, tmp_path / "rows.pt")
    assert (tmp_path / "rows.pt").stat().st_size < 5000
    assert torch.equal(load_tensor_file(tmp_path / "rows.pt", "file")["rows"]["weight"], buffer[:10])
