"""Weight files of every family: recognized, joined, or refused in one line."""

import pickle

import pytest
import safetensors.torch
import torch

from scf_fast import SCF
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.weights.contents import Facts
from scf_fast.weights.family_names import family_state
from scf_fast.weights.reading import read_weights

SMALL = {"published": "ir_small", "tface": "tface_ir_small", "insightface": "iresnet_small"}


def backbone_in(spec):
    return read_weights(spec, "--saved_bkb").require_backbone()


def class_centers_in(spec):
    return read_weights(spec, "--saved_fc").require_class_centers()


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("family", list(SMALL))
def test_backbone_and_class_centers_of_every_family(family, tmp_path, save_as):
    saved = save_as(family, tmp_path)
    assert same(backbone_in(saved.saved_bkb), saved.backbone.state_dict())
    assert torch.equal(class_centers_in(saved.saved_fc), saved.centers)
    assert read_weights(saved.saved_bkb).network() == (SMALL[family], 32)


def test_prefixes_nesting_and_safetensors(tmp_path, small_backbone):
    net = small_backbone("insightface")
    state = family_state(net.state_dict(), net.architecture)
    for name, value in {
        "parallel": {f"module.{key}": value for key, value in state.items()},
        "nested": {"epoch": 2, "state_dict": state},
        "deep": {"model": {"backbone": {f"module.{key}": value for key, value in state.items()}}},
    }.items():
        torch.save(value, tmp_path / name)
        assert same(backbone_in(tmp_path / name), net.state_dict())
    safetensors.torch.save_file(state, tmp_path / "no.suffix")
    assert same(dict(sorted(backbone_in(tmp_path / "no.suffix").items())), dict(sorted(net.state_dict().items())))
    torch.save(SCF(net, build_confidence_net("conv", 128, 7)).state_dict(), tmp_path / "whole")
    assert read_weights(tmp_path / "whole").parts == ("backbone", "confidence_net")


@pytest.mark.parametrize(
    "kept, named, expected",
    [
        ((0, 1, 2), "{}", None),
        ((0, 1, 2), "{}/checkpoint_gpu_*.pt", None),
        ((0, 1, 2), "{0}/checkpoint_gpu_0.pt,{0}/checkpoint_gpu_1.pt,{0}/checkpoint_gpu_2.pt", None),
        ((0, 2), "{}", "must be those of ranks 0 to 1, got 0, 2"),
        ((0, 1, 2), "{0}/checkpoint_gpu_2.pt,{0}/checkpoint_gpu_0.pt", "in the order of the ranks"),
        ((), "{}", "is a folder without checkpoint_gpu_"),
        ((), "{}/c*", "no file has a name like that"),
    ],
)
def test_class_centers_in_shards(kept, named, expected, tmp_path, save_as):
    centers = save_as("insightface", tmp_path, ranks=3).centers
    for path in tmp_path.glob("*.pt"):
        if int(path.stem[-1]) not in kept:
            path.unlink()
    if expected is None:
        assert torch.equal(class_centers_in(named.format(tmp_path)), centers)
    else:
        with pytest.raises(ValueError, match=expected):
            class_centers_in(named.format(tmp_path))


def tface_head(kind, columns):
    """Returns what TFace saves of one data set's head: a column for each class. PartialFC is no module there, so it is
    saved as its matrix.
    """
    return {
        "arcface": {"kernel": columns},
        "curricularface": {"kernel": columns, "t": torch.zeros(1)},
        "partialfc": columns,
    }[kind]


@pytest.mark.parametrize("kind", ["arcface", "curricularface", "partialfc"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_heads_of_tface(kind, ranks, tmp_path):
    centers = torch.randn(101, 32)
    for rank, shard in enumerate(centers.tensor_split(ranks)):
        torch.save(
            {"TFR-faces": tface_head(kind, shard.T.contiguous())},
            tmp_path / f"HEAD_Epoch_20_Split_{rank}_checkpoint.pth",
        )
    read_back = class_centers_in(tmp_path / "HEAD_Epoch_20_Split_*_checkpoint.pth")
    assert torch.equal(read_back, centers) and read_back.is_contiguous()


def test_the_moments_of_an_optimizer_are_no_weights(tmp_path, small_backbone):
    """TFace has them in a file of their own, as BACKBONE_OPT."""
    net, head = small_backbone("tface"), torch.nn.Linear(32, 7, bias=False)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    for parameter in [*net.parameters(), *head.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(
        {"model": family_state(net.state_dict(), net.architecture), "optim": optimizer.state_dict()}, tmp_path / "both"
    )
    weights = read_weights(tmp_path / "both")
    assert weights.parts == ("backbone",) and not weights.other and same(weights.backbone, net.state_dict())
    torch.save({"EPOCH": 20, "BACKBONE_OPT": optimizer.state_dict()}, tmp_path / "META_Epoch_20_checkpoint.pth")
    assert "must hold a state_dict of tensors or class centers, got dict without tensors" in refused(
        read_weights, tmp_path / "META_Epoch_20_checkpoint.pth"
    )


def test_heads_that_cannot_be_told_are_refused(tmp_path):
    torch.save(
        {"a": tface_head("arcface", torch.randn(4, 9)), "b": tface_head("arcface", torch.randn(4, 7))}, tmp_path / "two"
    )
    assert "must hold class centers once, got several" in refused(class_centers_in, tmp_path / "two")
    torch.save({"TFR-faces": torch.randn(8, 8)}, tmp_path / "square")
    assert "must hold class centers, one (classes, width) tensor, got keys like ['TFR-faces']" in refused(
        class_centers_in, tmp_path / "square"
    )
    for rank, width in enumerate((8, 4)):
        torch.save(torch.randn(9, width), tmp_path / f"wc_{rank}")
    assert "must have one width, got 4, 8" in refused(class_centers_in, tmp_path / "wc_*")


@pytest.mark.parametrize("colon", [":", "_"])
def test_a_folder_of_an_old_insightface_release(colon, tmp_path, save_as):
    saved = save_as("insightface", tmp_path)
    net, centers = saved.backbone, saved.centers
    for path in tmp_path.iterdir():
        path.unlink()
    torch.save(family_state(net.state_dict(), net.architecture), tmp_path / "backbone.pth")
    for rank, shard in enumerate(centers.tensor_split(3)):
        torch.save(shard.clone(), tmp_path / f"rank{colon}{rank}_softmax_weight.pt")
        torch.save(torch.zeros_like(shard), tmp_path / f"rank{colon}{rank}_softmax_weight_mom.pt")
    weights = read_weights(tmp_path)
    assert same(weights.backbone, net.state_dict()) and torch.equal(weights.class_centers, centers)


def test_two_backbones_are_refused(tmp_path, small_backbone):
    net = small_backbone("published")
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save({key: value + 1 for key, value in net.state_dict().items()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"must hold one backbone, but .*b.pt has another"):
        read_weights(f"{tmp_path}/a.pt,{tmp_path}/b.pt")
    averaged = {key: value + 1 for key, value in net.state_dict().items()}
    torch.save({"state_dict": net.state_dict(), "averaged": averaged}, tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match=r"c.pt: must hold backbone once, got several, in 'state_dict' and in 'averaged'"
    ):
        read_weights(tmp_path / "c.pt")


def test_the_folder_of_a_run_stands_for_its_files(tmp_path, small_backbone):
    net, centers = small_backbone("published"), torch.randn(5, 32)
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    torch.save({"arc_face_state_dict": {"weight": centers}, "normalization": "published"}, tmp_path / "fc.pth")
    weights = read_weights(tmp_path)
    assert (
        same(weights.backbone, net.state_dict())
        and torch.equal(weights.class_centers, centers)
        and weights.facts == Facts(normalization="published")
    )


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def refused(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_files_are_one_clear_line(tmp_path, capsys, recwarn):
    cases = {
        "missing": (None, "cannot be read"),
        "text": (b"hello", "is no checkpoint of tensors"),
        "empty": (b"", "is an empty file"),
        "code": (pickle.dumps(Evil()), "is a Python pickle; code in it is never run"),
        "zip": (b"PK\x03\x04aaaa", "is a zip archive"),
        "short": (b"\x08\0\0\0\0\0\0\0{}      ", "must hold a state_dict"),
        "cut": (b"\x40\0\0\0\0\0\0\0{" + b" " * 80, "is a safetensors file; download or copy it again"),
    }
    for name, (content, expected) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert f"--saved_bkb {tmp_path}/{name}: {expected}" in refused(backbone_in, tmp_path / name)
    torch.save({"x": Evil()}, tmp_path / "code.pt")
    assert "loading it would run print" in refused(class_centers_in, tmp_path / "code.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "would run torch.nn.modules.linear.Linear, and code from a checkpoint is never run" in refused(
        read_weights, tmp_path / "module.pt"
    )
    assert "must not run" not in capsys.readouterr().out and not recwarn.list
    torch.save([1, 2], tmp_path / "list")
    assert "must hold a state_dict of tensors or class centers, got list" in refused(backbone_in, tmp_path / "list")


def test_files_of_another_kind_are_named_for_what_they_are(tmp_path, save_as):
    saved = save_as("published", tmp_path)
    assert "must hold class centers, one (classes, width) tensor, but holds backbone ir_small (published)" in refused(
        class_centers_in, saved.saved_bkb
    )
    assert "must hold a backbone's state_dict of tensors, but holds class centers of 5 identities" in refused(
        backbone_in, saved.saved_fc
    )
    state = saved.backbone.state_dict()
    del state["body.1.res_layer.0.weight"]
    torch.save(state, tmp_path / "damaged")
    assert "nearest is ir_small: 1 missing (body.1.res_layer.0.weight)" in refused(
        read_weights(tmp_path / "damaged").network
    )
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "other")
    assert "must hold class centers, one (classes, width) tensor, got keys like ['a', 'b']" in refused(
        class_centers_in, tmp_path / "other"
    )
    assert "no backbone: must have 'output_layer.3.weight'" in refused(backbone_in, tmp_path / "other")
    torch.save(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), tmp_path / "zero")
    assert "no row of the class centers must be zero" in refused(class_centers_in, tmp_path / "zero")
    torch.save(torch.tensor([[1.0, float("nan")]]), tmp_path / "nan")
    assert "must be finite" in refused(class_centers_in, tmp_path / "nan")
