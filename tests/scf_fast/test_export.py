import importlib.util

import numpy as np
import pytest
import torch

from scf_fast import export
from scf_fast.model import SCF, save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.objectives import Objective
from scf_fast.pipelines.loading.base import Preprocessing

HAS_ONNX = all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")


def make_model(network="ir_tiny", net="conv", objective=Objective.SCF, outputs=1):
    torch.manual_seed(0)
    backbone = Backbone(network, 24)
    model = SCF(
        backbone,
        build_confidence_net(net, backbone.architecture.widths[-1], 7, initial_kappa=300.0, outputs=outputs),
        radius=32.0,
        normalization="published",
        objective=objective,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(256, (4, 112, 112, 3), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)


def check(run, model, pixels, preprocess):
    """The exported model on images that the export itself has not seen, in a batch size that it has not seen."""
    images = Preprocessing(model.normalization).normalize(pixels)
    with torch.no_grad():
        expected_mu, expected_kappa = model(images)
    mu, kappa = run(pixels if preprocess else images)
    torch.testing.assert_close(mu, expected_mu, rtol=0, atol=1e-4)
    torch.testing.assert_close(kappa, expected_kappa, rtol=1e-4, atol=0)


@pytest.mark.parametrize("preprocess", [False, True])
def test_program(model, pixels, tmp_path, preprocess):
    export.export(model, tmp_path / "model.pt2", preprocess=preprocess)
    check(torch.export.load(tmp_path / "model.pt2").module(), model, pixels, preprocess)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@needs_onnx
@pytest.mark.parametrize(
    ("network", "net", "preprocess", "opset"), [("ir_tiny", "conv", True, 18), ("ir_se_small", "mlp", False, 20)]
)
def test_onnx(pixels, tmp_path, network, net, preprocess, opset):
    import onnx
    import onnxruntime

    model = make_model(network, net)
    export.export(model, tmp_path / "model.onnx", preprocess=preprocess, opset=opset)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    check(
        lambda images: [
            torch.from_numpy(array)
            for array in session.run(["mu", "kappa"], {"images": np.ascontiguousarray(images.numpy())})
        ],
        model,
        pixels,
        preprocess,
    )
    stored = onnx.load(tmp_path / "model.onnx")
    assert (
        {entry.domain: entry.version for entry in stored.opset_import}[""]
        == opset
        == export.read_opset(tmp_path / "model.onnx")
    )
    assert stored.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert '"radius": 32.0' in {entry.key: entry.value for entry in stored.metadata_props}["scf_fast"]


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=needs_onnx), "safetensors"])
def test_a_gaussian_model_gives_its_precision_and_says_so(pixels, tmp_path, suffix, capsys):
    model, out = make_model(net="pfe", objective=Objective.PFE, outputs=24), tmp_path / f"model.{suffix}"
    states = model.backbone.state_dict(), model.confidence_net.state_dict()
    save_model(tmp_path / "m.pt", *states, radius=32.0, normalization="published", objective=Objective.PFE)
    assert export.main([str(tmp_path / "m.pt"), str(out)]) == 0
    if suffix == "safetensors":
        again = SCF.from_checkpoint(out)
        assert again.objective is Objective.PFE
        check(again, model, pixels, False)
        return
    told = capsys.readouterr().out
    assert "-> mu and precision" in told and (", opset 18;" in told) == (suffix == "onnx")
    if suffix == "pt2":
        check(torch.export.load(out).module(), model, pixels, False)
        return
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["mu", "precision"]
    check(
        lambda images: map(torch.from_numpy, session.run(names, {"images": np.ascontiguousarray(images.numpy())})),
        model,
        pixels,
        False,
    )
    (facts,) = [entry.value for entry in onnx.load(out).metadata_props if entry.key == "scf_fast"]
    assert '"objective": "pfe"' in facts


def make_backbone():
    model = make_model()
    return SCF(model.backbone, None, normalization="published")


def test_program_of_a_backbone_alone_gives_its_features(pixels, tmp_path):
    model = make_backbone()
    export.export(model, tmp_path / "model.pt2", preprocess=True)
    found = torch.export.load(tmp_path / "model.pt2").module()(pixels)
    with torch.no_grad():
        expected = model.backbone(Preprocessing("published").normalize(pixels))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.norm(dim=1).sub(1).abs().min() > 0.1  # so they are not normalized


@needs_onnx
def test_onnx_of_a_backbone_alone_has_one_output_and_weights_too_large_for_one_file_lie_beside_it(
    pixels, tmp_path, monkeypatch
):
    import onnxruntime

    monkeypatch.setattr(export, "_ONE_FILE", 1000)
    model = make_backbone()
    export.export(model, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = Preprocessing("published").normalize(pixels)
    assert [(output.name, output.shape) for output in session.get_outputs()] == [("features", ["batch", 24])]
    with torch.no_grad():
        expected = model.backbone(images)[0].numpy()
    np.testing.assert_allclose(
        session.run(None, {"images": np.ascontiguousarray(images.numpy())})[0], expected, rtol=1e-4, atol=1e-4
    )


def test_command_on_a_backbone_alone(tmp_path, capsys):
    model = make_backbone()
    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pth")
    assert (
        export.main([str(tmp_path / "backbone.pth"), str(tmp_path / "m.safetensors"), "--normalization", "insightface"])
        == 0
    )
    assert "weights, insightface scaling" in capsys.readouterr().out
    again = SCF.from_checkpoint(tmp_path / "m.safetensors", backbone_alone=True)
    assert again.confidence_net is None and again.normalization == "insightface"
    for (name, value), (other, found) in zip(
        sorted(model.state_dict().items()), sorted(again.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(value, found)


def test_weights(model, tmp_path):
    export.export(model, tmp_path / "model.safetensors")
    again = SCF.from_checkpoint(tmp_path / "model.safetensors")
    assert again.radius == 32.0 and again.normalization == "published" and again.objective is Objective.SCF
    for (name, value), (other, found) in zip(
        sorted(model.state_dict().items()), sorted(again.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(value, found)


def test_a_file_that_gives_other_numbers_is_not_kept(model, tmp_path, monkeypatch):
    def load_with_another_kappa(path):
        assert path.read_bytes() == b"a new one"

        def program(images):
            mu, kappa = model(images)
            return mu, kappa * 1.001

        return program

    another = export._Format(lambda model, path, *_: path.write_bytes(b"a new one"), load_with_another_kappa)
    monkeypatch.setitem(export._FORMATS, ".pt2", another)
    (tmp_path / "model.pt2").write_bytes(b"an earlier one")
    with pytest.raises(ValueError, match=r"differs from PyTorch's by 1\.0e-03 with 1 images"):
        export.export(model, tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"] and (
        tmp_path / "model.pt2"
    ).read_bytes() == b"an earlier one"


def test_command(model, tmp_path, capsys):
    save_model(
        tmp_path / "m.pt",
        model.backbone.state_dict(),
        model.confidence_net.state_dict(),
        radius=32.0,
        normalization="published",
    )
    arguments = [str(tmp_path / "m.pt"), str(tmp_path / "out" / "m.safetensors")]
    assert export.main(arguments) == 0
    assert "weights, published scaling; output within 1e-04 of PyTorch's" in capsys.readouterr().out
    assert export.main(arguments) == 2
    assert "exists; give another name, or --overwrite" in capsys.readouterr().err
    assert export.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("m.bin", [], "must end in .onnx, .pt2, .safetensors"),
        ("m.safetensors", ["--preprocess"], "holds weights and no program"),
        ("m.pt2", [], "absent: cannot be read"),
        ("m.pt2", ["--opset", "18"], "--opset belongs to .onnx"),
        ("m.safetensors", ["--opset", "17"], "--opset belongs to .onnx"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, out, options, message):
    assert export.main([str(tmp_path / "absent"), str(tmp_path / out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / out).exists()


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"needs onnxscript; install .* pip install '\.\[export\]'"):
        export.check_request(tmp_path / "m.onnx", False)


@needs_onnx
def test_an_opset_that_the_file_has_not_got_is_refused(model, tmp_path, capsys):
    """PyTorch writes 18 where it cannot convert to an older one, and warns at most."""
    save_model(
        tmp_path / "m.pt",
        model.backbone.state_dict(),
        model.confidence_net.state_dict(),
        radius=32.0,
        normalization="published",
    )
    out = tmp_path / "m.onnx"
    assert export.main([str(tmp_path / "m.pt"), str(out), "--opset", "17"]) == 2
    captured = capsys.readouterr()
    assert (
        "--opset 17: PyTorch" in captured.err and "in opset 18 and cannot convert it; give --opset 18" in captured.err
    )
    assert "opset" not in captured.out and [path.name for path in tmp_path.iterdir()] == ["m.pt"]


@needs_onnx
def test_an_opset_that_onnxruntime_cannot_read_is_one_clear_line(tmp_path):
    import onnx

    identity = onnx.helper.make_node("Identity", ["images"], ["features"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b"]) for name in ("images", "features")]
    graph = onnx.helper.make_graph([identity], "g", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 999)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"^m\.onnx: onnxruntime .* cannot read it, .*give a lower --opset"):
        export._load_onnx(tmp_path / "m.onnx")
