import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from scf_fast import SCF
from scf_fast.checkpoints import main
from scf_fast.model import save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.networks.families import family_state
from scf_fast.weights.contents import Facts, Part, Weights
from scf_fast.weights.files import save_torch_file
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import write_weights

SMALL = {"published": "ir_small", "tface": "tface_ir_small", "insightface": "iresnet_small"}


def backbone(family, z_dim=32):
    torch.manual_seed(1)
    net = Backbone(SMALL[family], z_dim).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def backbone_in(spec):
    return read_weights(spec, "--saved_bkb").require_backbone()


def class_centers_in(spec):
    return read_weights(spec, "--saved_fc").require_class_centers()


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# What the training code of each family saves, written here by hand.
def published_files(folder):
    net, centers = backbone("published"), torch.randn(5, 32)
    torch.save(net.state_dict(), folder / "b.pth")
    torch.save({"arc_face_state_dict": {"weight": centers}}, folder / "f.pth")
    return folder / "b.pth", folder / "f.pth", net, centers


def tface_files(folder):
    net, centers = backbone("tface"), torch.randn(5, 32)
    torch.save(family_state(net.state_dict(), net.architecture), folder / "Backbone_Epoch_27_checkpoint.pth")
    torch.save(centers, folder / "wc.pth")
    return folder / "Backbone_Epoch_27_checkpoint.pth", folder / "wc.pth", net, centers


def insightface_files(folder, ranks=2):
    net, centers = backbone("insightface"), torch.randn(5, 32)
    state = family_state(net.state_dict(), net.architecture)
    for rank, shard in enumerate(centers.tensor_split(ranks)):
        other = {
            key: value + rank if key.endswith("running_mean") else value for key, value in state.items()
        }  # nothing synchronizes them there
        torch.save(
            {
                "epoch": 3,
                "global_step": 120,
                "state_dict_backbone": other,
                "state_dict_softmax_fc": {"weight": shard.clone()},
                "state_optimizer": {
                    "state": {0: {"momentum_buffer": torch.zeros(2, 2)}},
                    "param_groups": [{"lr": 0.1, "params": [0]}],
                },
                "state_lr_scheduler": {"base_lrs": [0.1]},
            },
            folder / f"checkpoint_gpu_{rank}.pt",
        )
    return folder, folder, net, centers


FILES = {"published": published_files, "tface": tface_files, "insightface": insightface_files}


@pytest.mark.parametrize("family", list(FILES))
def test_backbone_and_class_centers_of_every_family(family, tmp_path):
    saved_bkb, saved_fc, net, centers = FILES[family](tmp_path)
    assert same(backbone_in(saved_bkb), net.state_dict())
    assert torch.equal(class_centers_in(saved_fc), centers)
    assert read_weights(saved_bkb).network() == (SMALL[family], 32)


def test_prefixes_nesting_and_safetensors(tmp_path):
    net = backbone("insightface")
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
def test_class_centers_in_shards(kept, named, expected, tmp_path):
    *_, centers = insightface_files(tmp_path, ranks=3)
    for path in tmp_path.glob("*.pt"):
        if int(path.stem[-1]) not in kept:
            path.unlink()
    if expected is None:
        assert torch.equal(class_centers_in(named.format(tmp_path)), centers)
    else:
        with pytest.raises(ValueError, match=expected):
            class_centers_in(named.format(tmp_path))


def tface_head(kind, columns):
    """What TFace saves of one data set's head: a column for each class; PartialFC is no module there, and is saved as
    its matrix.
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


def test_the_moments_of_an_optimizer_are_no_weights(tmp_path):
    """Whatever a file calls it: TFace has BACKBONE_OPT, in a file of its own."""
    net, head = backbone("tface"), torch.nn.Linear(32, 7, bias=False)
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
def test_a_folder_of_an_old_insightface_release(colon, tmp_path):
    *_, net, centers = insightface_files(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    torch.save(family_state(net.state_dict(), net.architecture), tmp_path / "backbone.pth")
    for rank, shard in enumerate(centers.tensor_split(3)):
        torch.save(shard.clone(), tmp_path / f"rank{colon}{rank}_softmax_weight.pt")
        torch.save(torch.zeros_like(shard), tmp_path / f"rank{colon}{rank}_softmax_weight_mom.pt")
    weights = read_weights(tmp_path)
    assert same(weights.backbone, net.state_dict()) and torch.equal(weights.class_centers, centers)


def test_two_backbones_are_refused(tmp_path):
    net = backbone("published")
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save({key: value + 1 for key, value in net.state_dict().items()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"must hold one backbone, but .*b.pt has another"):
        read_weights(f"{tmp_path}/a.pt,{tmp_path}/b.pt")
    torch.save({"state_dict": net.state_dict(), "averaged": net.state_dict()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: must hold backbone once, got several"):
        read_weights(tmp_path / "c.pt")


def test_the_folder_of_a_run_stands_for_its_files(tmp_path):
    net, centers = backbone("published"), torch.randn(5, 32)
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
        "empty": (b"", "is no checkpoint of tensors"),
        "code": (pickle.dumps(Evil()), "is no checkpoint of tensors"),
        "zip": (b"PK\x03\x04aaaa", "is no checkpoint of tensors"),
        "short": (b"\x08\0\0\0\0\0\0\0{}      ", "must hold a state_dict"),
        "cut": (b"\x40\0\0\0\0\0\0\0{" + b" " * 80, "is no checkpoint of tensors"),
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


def test_files_of_another_kind_are_named_for_what_they_are(tmp_path):
    saved_bkb, saved_fc, net, _ = published_files(tmp_path)
    assert "must hold class centers, one (classes, width) tensor, but holds backbone ir_small (published)" in refused(
        class_centers_in, saved_bkb
    )
    assert "must hold a backbone's state_dict of tensors, but holds class centers of 5 identities" in refused(
        backbone_in, saved_fc
    )
    state = net.state_dict()
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
    assert "no row zero" in refused(class_centers_in, tmp_path / "zero")
    torch.save(torch.tensor([[1.0, float("nan")]]), tmp_path / "nan")
    assert "must be finite" in refused(class_centers_in, tmp_path / "nan")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.pt"
    save_torch_file({"a": torch.ones(1)}, path)
    with pytest.raises(Exception, match=r"pickle|local object"):
        save_torch_file({"a": lambda: 0}, path)
    assert torch.load(path)["a"].item() == 1


ROUND_TRIPS = [
    (family, layout, part)
    for family, net in (("published", "mlp"), ("tface", "conv"), ("insightface", None))
    for layout in (family, "scf_fast", "safetensors")
    for part in Part
    if net is not None or part is not Part.CONFIDENCE_NET
]


@pytest.mark.parametrize("family, layout, part", ROUND_TRIPS)
def test_conversions_keep_every_bit(family, layout, part, tmp_path):
    """There and back: equal values, types and names; half precision stays half."""
    net = build_confidence_net("mlp" if family == "published" else "conv", 16, 7)
    whole = Weights(
        backbone={
            key: value.half() if value.is_floating_point() else value
            for key, value in backbone(family).state_dict().items()
        },
        class_centers=torch.randn(7, 32).bfloat16(),
        confidence_net=net.state_dict(),
        facts=Facts(epoch=4),
    )
    write_weights(whole.only(part), tmp_path / "first", family)
    assert main(["convert", str(tmp_path / "first"), str(tmp_path / "there"), "--to", layout]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", family]) == 0
    for path in ("first", "there", "back"):
        found = getattr(read_weights(tmp_path / path), part.value)
        expected = getattr(whole, part.value)
        if part is Part.CLASS_CENTERS:
            assert torch.equal(found, expected) and found.dtype == expected.dtype
        else:
            assert same(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_layouts_are_those_of_the_other_code(tmp_path):
    mlp, centers = build_confidence_net("mlp", 128, 7).state_dict(), torch.randn(3, 32)
    ours = {family: backbone(family).state_dict() for family in SMALL}
    write_weights(
        Weights(confidence_net=mlp, backbone=ours["published"], facts=Facts(epoch=1, global_step=9, radius=64.0)),
        tmp_path / "p",
        "published",
    )
    assert set(torch.load(tmp_path / "p")) == {"uncer_net_state_dict", "backbone_state_dict", "epoch", "global_step"}
    write_weights(Weights(class_centers=centers), tmp_path / "f", "published")
    assert torch.equal(torch.load(tmp_path / "f")["arc_face_state_dict"]["weight"], centers)
    write_weights(Weights(class_centers=centers), tmp_path / "t", "tface")
    assert torch.equal(torch.load(tmp_path / "t"), centers)
    write_weights(Weights(class_centers=centers, backbone=ours["insightface"]), tmp_path / "i", "insightface")
    found = torch.load(tmp_path / "i")
    assert (
        torch.equal(found["state_dict_softmax_fc"]["weight"], centers)
        and "layer4.0.downsample.1.running_var" in found["state_dict_backbone"]
    )
    write_weights(Weights(backbone=ours["tface"]), tmp_path / "b", "tface")
    assert same(torch.load(tmp_path / "b"), ours["tface"])
    write_weights(
        Weights(confidence_net=mlp, backbone=ours["insightface"], facts=Facts(radius=32.0)),
        tmp_path / "s",
        "safetensors",
    )
    with safetensors.safe_open(tmp_path / "s", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"backbone", "confidence_net"} and json.loads(
            file.metadata()["scf_fast"]
        ) == {"radius": 32.0}


@pytest.mark.parametrize(
    "family, parts, layout, expected",
    [
        ("published", ["backbone"], "insightface", "ir_small cannot be written for insightface, whose"),
        ("tface", ["backbone"], "published", "use --to tface"),
        ("insightface", ["backbone"], "tface", "no projection where the width stays"),
        ("tface", ["confidence_net"], "published", "which has mlp alone"),
        ("published", ["confidence_net"], "tface", "which has conv alone"),
        ("published", ["confidence_net"], "insightface", "insightface has no confidence net"),
        ("published", ["backbone", "class_centers"], "published", "choose with --part"),
        ("published", ["backbone", "class_centers"], "scf_fast", "choose with --part"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_line(family, parts, layout, expected, tmp_path, capsys):
    net = build_confidence_net("conv" if family == "tface" else "mlp", 16, 7).state_dict()
    whole = {"backbone": backbone(family).state_dict(), "class_centers": torch.randn(3, 32), "confidence_net": net}
    write_weights(Weights(**{part: whole[part] for part in parts}), tmp_path / "in", "safetensors")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", layout]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and expected in error and not (tmp_path / "out").exists()
    if "--part" in expected:
        assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", layout, "--part", "backbone"]) == 0
        assert read_weights(tmp_path / "out").parts == ("backbone",)


def test_convert_overwrites_when_told_to(tmp_path, capsys):
    _, saved_fc, _, centers = published_files(tmp_path)
    command = ["convert", str(saved_fc), str(tmp_path / "out"), "--to", "tface"]
    assert main(command) == 0 and main(command) == 2 and "exists; give another name" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and torch.equal(torch.load(tmp_path / "out"), centers)


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    insightface_files(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "backbone iresnet_small (insightface), embedding 32, last map 128 x 7 x 7" in out
    assert "class centers of 5 identities, width 32, float32" in out and "epoch 3" in out and "global_step 120" in out
    torch.save(
        {
            "epoch": 1,
            "uncer_net_state_dict": build_confidence_net("mlp", 8, 7).state_dict(),
            "opt_state": {"state": {}},
        },
        tmp_path / "c",
    )
    assert main(["inspect", str(tmp_path / "c")]) == 0 and "confidence net mlp on 392 values" in capsys.readouterr().out
    np.save(tmp_path / "n.npy", np.zeros(3))
    assert main(["inspect", str(tmp_path / "n.npy")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_model_file_round_trip(tmp_path):
    torch.manual_seed(0)
    net, confidence = backbone("published"), build_confidence_net("conv", 128, 7).eval()
    save_model(
        tmp_path / "scf_model.pt",
        net.state_dict(),
        confidence.state_dict(),
        radius=32.0,
        normalization="published",
        epoch=1,
    )
    images = torch.randn(2, 3, 112, 112)
    for path in (tmp_path, tmp_path / "scf_model.pt"):
        model = SCF.from_checkpoint(path)
        features, log_kappa = model.embed(images)
        with torch.no_grad():
            expected, convf = net(images)
            torch.testing.assert_close(features, expected)
            torch.testing.assert_close(log_kappa, confidence(convf))
        mu, kappa = model(images)
        torch.testing.assert_close(mu.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(kappa, log_kappa.exp())
        assert (model.radius, model.normalization, model.embedding_dim) == (32.0, "published", 32)
    save_torch_file(net.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(
        ValueError, match="must hold a confidence net's state_dict of tensors, but holds backbone ir_small"
    ):
        SCF.from_checkpoint(tmp_path / "backbone.pth")


@pytest.mark.parametrize(
    "family, net, normalization",
    [("published", "mlp", "published"), ("tface", "conv", "insightface"), ("insightface", "conv", "insightface")],
)
def test_a_model_from_the_files_of_other_code(family, net, normalization, tmp_path):
    """Backbone and confidence net apart, as the published code and TFace save them, and the same two in one file of
    ours.
    """
    saved_bkb, _, trunk, _ = FILES[family](tmp_path)
    if family == "insightface":
        saved_bkb = tmp_path / "checkpoint_gpu_0.pt"
    confidence = build_confidence_net(net, 128, 7).eval()
    torch.save({"epoch": 0, "uncer_net_state_dict": confidence.state_dict()}, tmp_path / "ckpt_e1.pt")
    both = f"{saved_bkb},{tmp_path}/ckpt_e1.pt"
    images = torch.randn(1, 3, 112, 112)
    model = SCF.from_checkpoint(both)
    assert (model.radius, model.normalization) == (64.0, normalization)
    mu, kappa = model(images)
    with torch.no_grad():
        features, convf = trunk(images)
        torch.testing.assert_close(mu, torch.nn.functional.normalize(features))
        torch.testing.assert_close(kappa, confidence(convf).exp())
    assert SCF.from_checkpoint(both, radius=16.0, normalization="published").radius == 16.0
    source = both if family != "insightface" else str(tmp_path / "whole")
    if family == "insightface":
        write_weights(
            Weights(backbone=trunk.state_dict(), confidence_net=confidence.state_dict()), source, "safetensors"
        )
    assert main(["convert", source, str(tmp_path / "model.pt"), "--to", "scf_fast", "--radius", "32"]) == 0
    assert torch.equal(SCF.from_checkpoint(tmp_path / "model.pt")(images)[0], mu)
    with pytest.raises(ValueError, match=r"was trained with radius 32.0, got 64.0"):
        SCF.from_checkpoint(tmp_path / "model.pt", radius=64.0)
    torch.save(build_confidence_net("mlp", 8, 7).state_dict(), tmp_path / "small")
    with pytest.raises(ValueError, match="the confidence net does not fit the"):
        SCF.from_checkpoint(f"{saved_bkb},{tmp_path}/small")
