"""Weight files in every layout: complete or not there, each bit kept."""

import json

import pytest
import safetensors
import torch

from scf_fast.checkpoints import main
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.weights.contents import Facts, Part, Weights
from scf_fast.weights.files import save_torch_file
from scf_fast.weights.reading import read_weights
from scf_fast.weights.writing import write_weights


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


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
def test_conversions_keep_every_bit(family, layout, part, tmp_path, small_backbone):
    """There and back: equal values, types and names; half precision stays half."""
    net = build_confidence_net("mlp" if family == "published" else "conv", 16, 7)
    whole = Weights(
        backbone={
            key: value.half() if value.is_floating_point() else value
            for key, value in small_backbone(family).state_dict().items()
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


def test_layouts_are_those_of_the_other_code(tmp_path, small_backbone):
    mlp, centers = build_confidence_net("mlp", 16, 7).state_dict(), torch.randn(3, 32)
    ours = {family: small_backbone(family).state_dict() for family in ("published", "tface", "insightface")}
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
