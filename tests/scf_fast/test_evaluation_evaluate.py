"""The evaluation from files to report, on pictures whose identity, and how much of it is left, can be read off their pixels."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.template_protocol import write_template_protocol
from pipelines.verification_set import write_verification_set
from scf_fast.evaluation import __main__ as command
from scf_fast.evaluation import report
from scf_fast.evaluation.alignment import TEMPLATE


class PixelModel:
    """An embedder: features are a picture's 4 x 4 blocks of colour, kappa their contrast."""

    radius, embedding_dim, normalization, device = 64.0, 48, "insightface", torch.device("cpu")

    def __init__(self, model, device, precision, flip):
        self.key = f"pixels {model} {flip}"

    def __call__(self, images):
        features = torch.nn.functional.avg_pool2d(images.float(), 28).flatten(1)
        return features, 6 + torch.linalg.vector_norm(features, dim=1).log()


@pytest.fixture(autouse=True)
def pixel_models(monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda path: path)
    monkeypatch.setattr(command, "Embedder", PixelModel)


def run(*arguments):
    loading = ["--device", "cpu", "--loader", "torch", "--num-workers", "0"]
    return command.main([*map(str, arguments), *loading])


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
    """Verification sets, a template protocol with 1:N files, and folders of subjects."""
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
        template_ids=np.arange(count) // 2, media_ids=np.arange(count), landmarks=np.tile(TEMPLATE, (count, 1, 1)), detector_score=1 - severities / 2,
        pair_template_ids=np.stack([first, second], axis=1), pair_labels=first // 2 == second // 2)
    write_csv(root / "templates" / "severity.csv", ["name", "identity", "severity"], zip(names, identities, severities))
    # Even templates are enrolled, in one gallery or the other; odd ones, of the same identities, are searched for.
    for gallery, templates in ("G1", range(0, 20, 2)), ("G2", range(20, 40, 2)), ("probe_mixed", range(1, 40, 2)):
        kind = gallery if gallery == "probe_mixed" else f"gallery_{gallery}"
        write_csv(root / "templates" / "meta" / f"tiny_1N_{kind}.csv", ["TEMPLATE_ID", "SUBJECT_ID"], [(t, t // 2) for t in templates for _ in range(2)])
    for identity in range(24):
        for number in range(3):
            kind = "probe" if number == 2 else "gallery"
            if kind == "gallery" and identity >= 12:
                continue
            path = root / "people" / kind / f"person{identity}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(identity, 0.3, rng))
    return root


def test_full_report(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("report", "--model", tmp_path / "pixels", "--data", data, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["model"] == str(tmp_path / "pixels") and results["request"]["command"] == "report"
    verification = results["verification"]
    assert verification["set"] == "clean" and verification["accuracy"] == verification["accuracy_vmf"] == verification["auc"] == 1
    mixed = verification["others"]["mixed"]
    assert 0.5 < mixed["accuracy"] < 1 and mixed["tar_at_far"].keys() == {"1e-01"} and 0 < mixed["eer"] < 0.5
    assert results["kappa"]["severity_spearman"] < -0.7 and results["template_quality"]["kappa"]["severity_spearman"] < -0.7
    areas = results["reject_area"]
    assert areas["oracle"] < areas["kappa"] < areas["random"]
    assert areas["feature_norm"] == pytest.approx(areas["kappa"])  # this model's kappa rises with the feature norm alone
    assert results["reject"]["set"] == "mixed" and 0 < results["reject"]["error"]["kappa"][0] < 0.5
    templates = results["templates"]
    assert templates["protocol"] == "tiny"
    assert templates["templates"] == 40 and templates["genuine_pairs"] == 20 and templates["impostor_pairs"] == 760
    poolings = ["average", "norm", "detector", "norm_detector", "kappa", "kappa_vmf"]
    assert all(templates[key].keys() == {"1e-01"} for key in poolings)  # 760 impostors
    assert templates["kappa"]["1e-01"] >= templates["average"]["1e-01"] > 0.5
    identification = results["identification"]
    assert identification["galleries"] == ["G1", "G2"] and identification["enrolled"] == identification["searches"] == 20
    for key in poolings:
        ranks = list(identification[key]["rank"].values())
        assert identification[key]["mated"] == 20 and 0.3 < ranks[0] <= ranks[1] <= ranks[2] <= 1
        assert identification[key]["tpir_at_fpir"] == {}  # ten searches without mate a gallery decide no FPIR of at most 0.1
    assert results["seconds"]["evaluation"] > 0 and results["notes"] == []
    printed = capsys.readouterr().out
    for section in "## Verification", "## Templates: tiny, 1:1", "## Identification: tiny, 1:N", "## Quality", "## Error versus reject":
        assert section in printed and section in (out / "report.md").read_text()
    figures = [report.ROC, report.DET, report.TEMPLATES, report.REJECT, report.SEVERITY, report.HISTOGRAM, report.FACES, report.PAIRS]
    assert sorted(path.name for path in out.glob("*.png")) == sorted(figures)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures) and "http" not in page and "src=" in page
    for figure in figures:
        assert f"({figure})" in (out / "report.md").read_text()
        with Image.open(out / figure) as image:
            assert image.convert("L").getextrema()[0] < 255  # something is drawn on the white


def test_models_side_by_side(data, tmp_path, capsys):
    lfw = data / "verification" / "clean.bin"
    assert run("verify", "--model", "first=a", "second=b", "--data", lfw, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--flip") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"]) == ["first", "second"] and results["request"] | {"data": None} == {
        "command": "verify", "model": ["a", "b"], "data": None, "flip": True}
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines == ["model", lines[1], "first", "first", "second", "second"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["model1-det.png", "model1-roc.png", "model2-det.png", "model2-roc.png"]
    assert (tmp_path / "out" / "report.html").read_text().count("<figcaption>second") == 2
    # A report of one model takes the figures of the earlier one away.
    assert run("verify", "--model", "a", "--data", lfw, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["det.png", "roc.png"]


def test_ijb_command(data, tmp_path, capsys):
    assert run("ijb", "--model", tmp_path / "m", "--data", data / "templates", "--no-align", "--cache", tmp_path / "cache") == 0
    printed = capsys.readouterr().out
    assert "## Templates: tiny, 1:1" in printed and "norm × detector" in printed and "rank 10" in printed
    assert run("ijb", "--model", tmp_path / "m", "--data", data / "templates", data / "templates") == 2
    assert "different protocols" in capsys.readouterr().err


def test_identify_command(data, tmp_path, capsys):
    people = data / "people"
    command = ["identify", "--model", tmp_path / "m", "--gallery", people / "gallery", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run(*command, "--probe", people / "probe") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["identification"]
    assert found["enrolled"] == 12 and found["searches"] == 24
    assert found["kappa"]["mated"] == 12 and found["kappa"]["rank"]["1"] == 1
    assert found["kappa_vmf"]["tpir_at_fpir"].keys() == {"1e-01"} or found["kappa_vmf"]["tpir_at_fpir"] == {}
    (tmp_path / "strangers" / "nobody").mkdir(parents=True)
    (tmp_path / "strangers" / "nobody" / "1.png").write_bytes(picture(1, 0.0, np.random.default_rng(0)))
    assert run(*command, "--overwrite", "--probe", tmp_path / "strangers") == 2
    assert "none of the 1 subjects of the probes is in the gallery, such as 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("score", ["cosine", "vmf"])
def test_risk_command_on_templates(data, tmp_path, score, capsys):
    arguments = ["risk", "--model", tmp_path / "m", "--data", data / "templates", "--far", "0.1", "--score", score, "--cache", tmp_path / "cache"]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    areas = results["reject_area"]
    assert areas.keys() == {"kappa", "feature_norm", "detector", "random", "oracle"} and areas["oracle"] < areas["kappa"] < areas["random"]
    assert results["reject"]["far"] == 0.1 and "FAR 0.1 on all" in capsys.readouterr().out


def test_risk_command_wants_one_set(data, tmp_path, capsys):
    assert run("risk", "--model", "m", "--data", data) == 2
    assert "holds 2 verification sets" in capsys.readouterr().err
    assert run("risk", "--model", "m", "--data", data / "verification" / "mixed.bin", "--far", "1") == 2
    assert "--far must lie in [0, 1)" in capsys.readouterr().err


def test_data_without_severities_or_templates(data, tmp_path):
    root = tmp_path / "data"
    (root / "verification").mkdir(parents=True)
    (root / "verification" / "lfw.bin").write_bytes((data / "verification" / "clean.bin").read_bytes())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / report.SEVERITY).write_bytes(b"of an earlier report")
    assert run("report", "--model", tmp_path / "m", "--data", root, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["verification"]["set"] == results["reject"]["set"] == "lfw" and "templates" not in results
    assert results["kappa"]["severity_spearman"] is None
    assert not (tmp_path / "out" / report.SEVERITY).exists() and report.SEVERITY not in (tmp_path / "out" / "report.md").read_text()


def test_templates_alone(data, tmp_path):
    assert run("report", "--model", tmp_path / "m", "--data", data / "templates", "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["reject"]["set"] == "tiny" and "verification" not in results and "identification" in results


def test_published_table():
    def rates(low, high):
        return {"1e-05": low, "1e-04": high}

    def section(average, kappa):
        return {"templates": {"protocol": "IJB-C", "average": average, "kappa": kappa, "kappa_vmf": kappa, "others": {}, "images": 1, "templates": 1,
                              "genuine_pairs": 1, "impostor_pairs": 1}}

    models = {"ArcFace": section(rates(0.9315, 0.956), rates(0.9404, 0.9609)), "CosFace": section(rates(0.9386, 0.9595), rates(0.9478, 0.9622))}
    table = report.tables(models)[-1]
    assert table.header == ["TAR [%]", "IJB-C 1e-05", "IJB-C 1e-04"]
    assert table.rows[:2] == [["ArcFace", "93.15", "95.60"], ["+ SCF", "94.04", "96.09"]] and table.rows[3][0] == "CosFace"


def test_command_guards_the_report(data, tmp_path, capsys):
    arguments = ["verify", "--data", data / "verification" / "clean.bin", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run(*arguments, "--model", "runs/a") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    capsys.readouterr()
    assert run(*arguments, "--model", "runs/b") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/a" in error and "--overwrite" in error
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert run(*arguments, "--model", "runs/a") == 0  # the same evaluation may be repeated
    assert run(*arguments, "--model", "runs/b", "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["request"]["model"] == ["runs/b"]


@pytest.mark.parametrize(("change", "message"), [
    ({"--data": "absent"}, "cannot read the pairs absent"),
    ({"--device": "nonsense"}, "must be a device"),
    ({"--batch-size": "0"}, "at least 1"),
])
def test_command_refuses_in_one_line(data, tmp_path, capsys, change, message):
    arguments = {"--model": tmp_path / "model.pt", "--data": data, "--out": tmp_path / "out"} | change
    try:
        status = command.main(["verify", *(str(word) for pair in arguments.items() for word in pair)])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_two_models_of_one_name_are_refused(data, capsys):
    assert run("verify", "--model", "a/run", "b/run", "--data", data) == 2
    assert "two models are named run" in capsys.readouterr().err


def test_command_refuses_a_folder_without_data(tmp_path, capsys):
    assert run("report", "--model", "m", "--data", tmp_path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "verification/*.bin" in error and not (tmp_path / "out").exists()


def test_a_folder_with_something_else_named_results_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no evaluation result"):
        report.check_folder(tmp_path, {}, overwrite=False)
    report.check_folder(tmp_path, {}, overwrite=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        report.check_folder(tmp_path / "out", {}, overwrite=True)


def test_tables_are_aligned_and_escaped():
    table = report.Table("Of <both>", ["set", "score"], [["clean", "0.5"], ["lfw", "10.25"]], "about")
    assert table.markdown().splitlines()[2:] == [
        "| set   | score |", "| ----- | ----: |", "| clean |   0.5 |", "| lfw   | 10.25 |", "", "about"]
    assert "Of &lt;both&gt;" in table.html() and "<td class=word>clean</td><td>0.5</td>" in table.html()
