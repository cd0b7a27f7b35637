"""The evaluation from files to report, on pictures whose identity, and how much of it is left, can be read off their pixels."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.sources import EncodedImages
from pipelines.template_protocol import write_template_protocol
from pipelines.verification_set import write_verification_set
from scf_fast.evaluation import __main__ as command
from scf_fast.evaluation import report
from scf_fast.evaluation.embeddings import embed_images
from scf_fast.evaluation.evaluate import evaluate

LOADING = {"device": "cpu", "batch_size": 7, "backend": "torch", "num_workers": 0, "flip": False}


class PixelModel:
    """Features are a picture's 4 x 4 blocks of colour, kappa their contrast."""

    radius, embedding_dim, normalization = 64.0, 48, "insightface"

    def embed(self, images):
        features = torch.nn.functional.avg_pool2d(images.float(), 28).flatten(1)
        return features, 6 + torch.linalg.vector_norm(features, dim=1).log()


def picture(identity, severity, rng):
    """Sixteen colours of the identity, faded to grey and noisy by severity; PNG, which every decoder reads alike."""
    colours = np.random.default_rng(identity).choice([-1.0, 1.0], size=(4, 4, 3)) * (1 - 0.9 * severity) + rng.normal(size=(4, 4, 3)) * 0.6 * severity
    pixels = np.clip(127.5 + 60 * colours, 0, 255).round().astype(np.uint8).repeat(28, axis=0).repeat(28, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    same = np.arange(200) % 2 == 0
    for name in "clean", "mixed":
        identities = [identity for pair in range(200) for identity in (pair, pair if same[pair] else pair + 1000)]
        severities = rng.random(400) * (name == "mixed")
        write_verification_set(root / "verification" / f"{name}.bin", map(lambda i, s: picture(i, s, rng), identities, severities), same)
        write_csv(root / "verification" / f"{name}.csv", ["image", "identity", "severity"], zip(range(400), identities, severities))
    identities, count = np.arange(80) // 4, 80
    names, severities = [f"{i}.png" for i in range(count)], rng.random(count)
    first, second = np.triu_indices(40, 1)
    write_template_protocol(
        root / "templates", "tiny", names=names, images=map(lambda i, s: picture(i, s, rng), identities, severities),
        template_ids=np.arange(count) // 2, media_ids=np.arange(count), landmarks=np.zeros((count, 5, 2)), detector_score=np.ones(count),
        pair_template_ids=np.stack([first, second], axis=1), pair_labels=first // 2 == second // 2)
    write_csv(root / "templates" / "severity.csv", ["name", "identity", "severity"], zip(names, identities, severities))
    return root


def test_full_report(data, tmp_path):
    results = evaluate(PixelModel(), data, tmp_path, name="pixels", **LOADING)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["verification"]["set"] == "clean" and results["verification"]["accuracy"] == results["verification"]["accuracy_vmf"] == 1
    mixed = results["verification"]["mixed"]
    assert 0.5 < mixed["accuracy"] < 1 and mixed["tar_at_far"].keys() == {"1e-01"}
    assert results["kappa"]["severity_spearman"] < -0.7 and results["template_quality"]["kappa"]["severity_spearman"] < -0.7
    areas = results["reject_area"]
    assert areas["oracle"] < areas["kappa"] < areas["random"]
    assert areas["feature_norm"] == pytest.approx(areas["kappa"])  # this model's kappa rises with the feature norm alone
    assert results["reject"]["set"] == "mixed" and 0 < results["reject"]["error"]["kappa"][0] < 0.5
    templates = results["templates"]
    assert templates["templates"] == 40 and templates["genuine_pairs"] == 20 and templates["impostor_pairs"] == 760
    assert templates["average"].keys() == templates["kappa"].keys() == templates["kappa_vmf"].keys() == {"1e-01"}  # 760 impostors
    assert templates["kappa"]["1e-01"] >= templates["average"]["1e-01"] > 0.5
    assert results["seconds"]["evaluation"] > 0 and results["notes"] == []
    markdown = (tmp_path / "report.md").read_text()
    for figure in (report.ROC, report.TEMPLATES, report.REJECT, report.SEVERITY, report.HISTOGRAM, report.FACES):
        assert f"({figure})" in markdown
        with Image.open(tmp_path / figure) as image:
            assert image.convert("L").getextrema()[0] < 255  # something is drawn on the white
    assert report.tables(results) in markdown


def test_data_without_severities_or_templates(data, tmp_path):
    root = tmp_path / "data"
    (root / "verification").mkdir(parents=True)
    (root / "verification" / "lfw.bin").write_bytes((data / "verification" / "clean.bin").read_bytes())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / report.SEVERITY).write_bytes(b"of an earlier report")
    results = evaluate(PixelModel(), root, tmp_path / "out", name="pixels", **LOADING)
    assert results["verification"]["set"] == results["reject"]["set"] == "lfw" and "templates" not in results
    assert results["kappa"]["severity_spearman"] is None
    assert len(results["notes"]) == 1 and "lfw.csv does not exist" in results["notes"][0]
    assert not (tmp_path / "out" / report.SEVERITY).exists() and report.SEVERITY not in (tmp_path / "out" / "report.md").read_text()


def test_templates_alone(data, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "templates").symlink_to(data / "templates")
    results = evaluate(PixelModel(), root, tmp_path / "out", name="pixels", **LOADING)
    assert results.keys() == {"model", "data", "templates", "template_quality", "notes", "seconds"}
    assert "## Templates" in report.tables(results) and "## Verification" not in report.tables(results)


def test_a_set_named_like_a_result_is_refused(data, tmp_path):
    root = tmp_path / "data"
    (root / "verification").mkdir(parents=True)
    for name in "clean", "pairs":
        (root / "verification" / f"{name}.bin").write_bytes((data / "verification" / "clean.bin").read_bytes())
    with pytest.raises(ValueError, match=r"named like a result, got pairs"):
        evaluate(PixelModel(), root, tmp_path / "out", name="pixels", **LOADING)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [[True, False] * 4, [True] * 10])
def test_sets_that_measure_nothing_are_refused_by_name(tmp_path, same):
    write_verification_set(tmp_path / "verification" / "few.bin", [b"never decoded"] * 2 * len(same), same)
    with pytest.raises(ValueError, match=r"few\.bin must have at least 10 pairs"):
        evaluate(PixelModel(), tmp_path, tmp_path / "out", name="pixels", **LOADING)


@pytest.mark.parametrize("flip", [False, True])
def test_embedding_keeps_the_order_of_the_source(flip):
    images = [picture(i, 0.2, np.random.default_rng(i)) for i in range(10)]
    embeddings = embed_images(PixelModel(), EncodedImages(images), "images", **LOADING | {"flip": flip})
    for i, encoded in enumerate(images):
        pixels = np.asarray(Image.open(io.BytesIO(encoded)), np.float64)
        blocks = ((pixels - 127.5) / 127.5).reshape(4, 28, 4, 28, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
        expected = blocks + blocks[:, :, ::-1] if flip else blocks
        np.testing.assert_allclose(embeddings.features[i], expected.ravel(), atol=1e-5)
        assert embeddings.kappa[i] == pytest.approx(np.exp(6) * np.linalg.norm(blocks), rel=1e-4)  # mirroring keeps the norm
        assert embeddings.feature_norm[i] == pytest.approx(np.linalg.norm(expected), rel=1e-5)


@pytest.mark.parametrize("damage", [
    lambda features, log_kappa: (features.log(), log_kappa),  # NaN where a feature is negative
    lambda features, log_kappa: (features * 0, log_kappa),
    lambda features, log_kappa: (features, log_kappa + 90),  # kappa overflows float32
])
def test_unusable_output_names_the_image(damage):
    class Broken(PixelModel):
        seen = 0

        def embed(self, images):
            first, self.seen = self.seen, self.seen + len(images)
            features, log_kappa = super().embed(images)
            damaged_features, damaged_log_kappa = damage(features, log_kappa)
            third_on = (torch.arange(first, self.seen) >= 3)
            return torch.where(third_on[:, None], damaged_features, features), torch.where(third_on, damaged_log_kappa, log_kappa)

    images = [picture(i, 0.2, np.random.default_rng(i)) for i in range(10)]
    with pytest.raises(ValueError, match="7 of 10 images are not so, the first image 3"):
        embed_images(Broken(), EncodedImages(images), "images", **LOADING)


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def test_command_guards_the_report_and_prints_the_tables(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda path, device: PixelModel())
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"model": "runs/a", "data": str(data)}))
    before = results.read_bytes()
    arguments = ["--model", "runs/b", "--data", data, "--out", tmp_path, "--device", "cpu", "--loader", "torch", "--num-workers", 0]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/a" in error and "--overwrite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"] and results.read_bytes() == before
    assert run(*arguments, "--overwrite") == 0
    printed = capsys.readouterr().out
    for section in "## Verification", "## Templates", "## Quality", "## Error versus reject":
        assert section in printed
    assert json.loads(results.read_text())["model"] == "runs/b"
    report.check_folder(tmp_path, "runs/b", str(data), overwrite=False)  # the same evaluation may be repeated


@pytest.mark.parametrize(("change", "message"), [
    ({"--model": "absent"}, "absent"),
    ({"--device": "nonsense"}, "must be a device"),
    ({"--batch-size": "few"}, "invalid int"),
])
def test_command_refuses_in_one_line(data, tmp_path, capsys, change, message):
    arguments = {"--model": tmp_path / "model.pt", "--data": data, "--out": tmp_path / "out"} | change
    try:
        status = run(*[word for pair in arguments.items() for word in pair])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_folder_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", lambda path, device: PixelModel())
    assert run("--model", "m", "--data", tmp_path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "verification/*.bin" in error and not (tmp_path / "out").exists()


def test_a_folder_with_something_else_named_results_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no evaluation result"):
        report.check_folder(tmp_path, "m", "d", overwrite=False)
    report.check_folder(tmp_path, "m", "d", overwrite=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        report.check_folder(tmp_path / "out", "m", "d", overwrite=True)


def test_table_is_aligned():
    assert report.table(["set", "score"], [["clean", "0.5"], ["lfw", "10.25"]]).splitlines() == [
        "| set   | score |", "| ----- | ----: |", "| clean |   0.5 |", "| lfw   | 10.25 |"]
