"""The evaluation from files to report, on pictures whose identity, and how much of it is left, can be read off their
pixels.
"""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import ive

from scf_fast.evaluation import __main__ as command
from scf_fast.evaluation import comparison, datasets, evaluate, plots, report
from scf_fast.evaluation.report_html import table_html
from scf_fast.evaluation.results import (
    BySet,
    FigureKind,
    Matcher,
    Results,
    Score,
    TemplateResult,
    Weighting,
)
from scf_fast.evaluation.tables import Table, make_tables
from scf_fast.inference import Embeddings, open_embedder
from scf_fast.model import save_model
from scf_fast.networks.backbones import Backbone
from scf_fast.networks.confidence import build_confidence_net
from scf_fast.objectives import Density, Objective
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, TemplateProtocol, write_template_protocol
from scf_fast.pipelines.evaluation_sets.verification_set import write_verification_set
from scf_fast.pipelines.face_template import TEMPLATE


class PixelModel:
    """An embedder: features are a picture's 4 x 4 blocks of color, kappa or 1 / variance their contrast.

    The model named "alone" is a backbone, "scalar" one of SCF-G, "diagonal" one of PFE-G, and any other one of SCF.
    """

    radius, embedding_dim, normalization, device = 64.0, 48, "insightface", torch.device("cpu")

    is_settled = True

    def __init__(self, model, options):
        self.key = f"pixels {model} {options.flip}"
        name = Path(model).name
        self.outputs = {"alone": 0, "diagonal": 48}.get(name, 1)
        trained_for = {"scalar": Objective.SCF_GAUSSIAN, "diagonal": Objective.PFE}.get(name, Objective.SCF)
        self.objective, self.density = trained_for if self.outputs else None, trained_for.density

    def __call__(self, images):
        features = torch.nn.functional.avg_pool2d(images.float(), 28).flatten(1)
        log_kappa = 6 + torch.linalg.vector_norm(features, dim=1).log() if self.outputs else None
        if self.density is Density.VMF:
            return Embeddings(features, log_kappa)
        log_variance = -log_kappa if self.outputs == 1 else -log_kappa[:, None] + 0.1 * features
        return Embeddings(features, log_variance, Density.GAUSSIAN)


@pytest.fixture(autouse=True)
def pixel_models(monkeypatch):
    monkeypatch.setattr(comparison, "open_embedder", PixelModel)


render = plots._png


@pytest.fixture(autouse=True)
def figures_without_pixels(monkeypatch):
    """Rendering takes most of a report's time; one test does it."""
    monkeypatch.setattr(plots, "_png", lambda figure: b"not rendered")


def run(*arguments):
    loading = ["--device", "cpu", "--loader", "torch", "--num-workers", "0"]
    return command.main([*map(str, arguments), *loading])


def picture(identity, severity, rng):
    """Sixteen colors of the identity, faded to gray and noisy by severity; PNG, which every decoder reads alike."""
    colors = (
        np.random.default_rng(identity).choice([-1.0, 1.0], size=(4, 4, 3)) * (1 - 0.9 * severity)
        + rng.normal(size=(4, 4, 3)) * 0.6 * severity
    )
    pixels = np.clip(127.5 + 60 * colors, 0, 255).round().astype(np.uint8).repeat(28, axis=0).repeat(28, axis=1)
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
        write_verification_set(
            root / "verification" / f"{name}.bin", map(lambda i, s: picture(i, s, rng), identities, severities), same
        )
        write_csv(
            root / "verification" / f"{name}.csv",
            ["image", "identity", "severity"],
            zip(range(400), identities, severities),
        )
    identities, count = np.arange(80) // 4, 80
    names, severities = [f"{i}.png" for i in range(count)], rng.random(count)
    first, second = np.triu_indices(40, 1)
    write_template_protocol(
        root / "templates",
        "tiny",
        names=names,
        images=map(lambda i, s: picture(i, s, rng), identities, severities),
        template_ids=np.arange(count) // 2,
        media_ids=np.arange(count),
        landmarks=np.tile(TEMPLATE, (count, 1, 1)),
        detector_score=1 - severities / 2,
        pair_template_ids=np.stack([first, second], axis=1),
        pair_labels=first // 2 == second // 2,
    )
    write_csv(root / "templates" / "severity.csv", ["name", "identity", "severity"], zip(names, identities, severities))
    # Even templates are enrolled, in one gallery or the other; odd ones, of the same identities, are searched for.
    for gallery, templates in ("G1", range(0, 20, 2)), ("G2", range(20, 40, 2)), ("probe_mixed", range(1, 40, 2)):
        kind = gallery if gallery == "probe_mixed" else f"gallery_{gallery}"
        write_csv(
            root / "templates" / "meta" / f"tiny_1N_{kind}.csv",
            ["TEMPLATE_ID", "SUBJECT_ID"],
            [(t, t // 2) for t in templates for _ in range(2)],
        )
    for identity in range(24):
        for number in range(3):
            kind = "probe" if number == 2 else "gallery"
            if kind == "gallery" and identity >= 12:
                continue
            path = root / "people" / kind / f"person{identity}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(identity, 0.3, rng))
    return root


def test_full_report(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "_png", render)
    out = tmp_path / "out"
    assert run("report", "--model", tmp_path / "pixels", "--data", data, "--out", out) == 0
    assert (tmp_path / "evaluation_features").is_dir()  # beside the model
    results = json.loads((out / "results.json").read_text())
    assert results["model"] == str(tmp_path / "pixels") and results["request"]["command"] == "report"
    verification = results["verification"]
    assert (
        verification["set"] == "clean"
        and verification["accuracy"] == verification["accuracy_vmf"] == verification["auc"] == 1
    )
    mixed = verification["others"]["mixed"]
    assert 0.5 < mixed["accuracy"] < 1 and mixed["tar_at_far"].keys() == {"1e-01"} and 0 < mixed["eer"] < 0.5
    assert (
        results["kappa"]["severity_spearman"] < -0.7
        and results["template_quality"]["kappa"]["severity_spearman"] < -0.7
    )
    areas = results["reject_area"]
    assert areas["oracle"] < areas["kappa"] < areas["random"]
    assert areas["feature_norm"] == pytest.approx(
        areas["kappa"]
    )  # this model's kappa rises with the feature norm alone
    assert results["reject"]["set"] == "mixed" and 0 < results["reject"]["error"]["kappa"][0] < 0.5
    templates = results["templates"]
    assert templates["protocol"] == "tiny"
    assert templates["templates"] == 40 and templates["genuine_pairs"] == 20 and templates["impostor_pairs"] == 760
    poolings = [
        "average",
        "norm",
        "detector",
        "norm_detector",
        "kappa",
        "kappa_vmf",
        "kappa_images",
        "kappa_images_vmf",
    ]
    assert all(templates[key].keys() == {"1e-01"} for key in poolings)  # 760 impostors
    assert templates["kappa"]["1e-01"] >= templates["average"]["1e-01"] > 0.5
    identification = results["identification"]
    assert (
        identification["galleries"] == ["G1", "G2"] and identification["enrolled"] == identification["searches"] == 20
    )
    for key in poolings:
        ranks = list(identification[key]["rank"].values())
        assert identification[key]["mated"] == 20 and 0.3 < ranks[0] <= ranks[1] <= ranks[2] <= 1
        assert (
            identification[key]["tpir_at_fpir"] == {}
        )  # ten searches without mate a gallery decide no FPIR of at most 0.1
    comparisons = identification["comparisons"]  # 20 enrolled by 20 probes, one mate each
    assert (
        sum(comparisons["genuine"]) == 20
        and sum(comparisons["impostor"]) == 380
        and comparisons["low"] < 0 < comparisons["high"]
    )
    assert results["seconds"]["evaluation"] > 0 and results["notes"] == []
    printed = capsys.readouterr().out
    for section in (
        "## Verification",
        "## Templates: tiny, 1:1",
        "## Identification: tiny, 1:N",
        "## Quality",
        "## Reliability of κ",
        "## Error versus reject",
    ):
        assert section in printed and section in (out / "report.md").read_text()
    figures = [f"{kind.value}.png" for kind in FigureKind if kind is not FigureKind.PRECISION_HISTOGRAM]
    assert sorted(path.name for path in out.glob("*.png")) == sorted(figures)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures) and "http" not in page and "src=" in page
    for figure in figures:
        assert f"({figure})" in (out / "report.md").read_text()
        with Image.open(out / figure) as image:
            assert image.convert("L").getextrema()[0] < 255  # something is drawn on the white


def rows_and_figures(out):
    """Numbers of results.json by their path, without those of time, and the names of the figures."""

    def flat(value, path=()):
        return (
            {k: v for key, entry in value.items() for k, v in flat(entry, (*path, key)).items()}
            if isinstance(value, dict)
            else {path: value}
        )

    results = json.loads((out / "results.json").read_text())
    measured = {key: entry for key, entry in results.items() if key not in ("request", "notes", "model", "seconds")}
    return flat(measured), {path.name for path in out.glob("*.png")}, results["notes"]


@pytest.mark.parametrize("model", ["scalar", "diagonal"])
def test_a_report_of_gaussians_names_what_it_measures(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("report", "--model", tmp_path / model, "--data", data, "--out", out) == 0
    results, printed = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    assert results["objective"] == {"scalar": "scf_gaussian", "diagonal": "pfe"}[model]
    assert results["verification"]["accuracy"] == results["verification"]["auc_mls"] == 1
    assert 0.5 < results["verification"]["others"]["mixed"]["accuracy_mls"] < 1
    assert results["precision"]["severity_spearman"] < -0.7
    areas = results["reject_area"]
    assert list(areas) == ["precision", "feature_norm", "random", "oracle"] and areas["precision"] < areas["random"]
    plain = ["average", "norm", "detector", "norm_detector"]
    poolings = [*plain, "precision", "precision_mls", "precision_images", "precision_images_mls"]
    assert list(results["templates"])[5:-1] == list(results["identification"])[4:-2] == poolings
    assert results["templates"]["precision_mls"]["1e-01"] >= results["templates"]["average"]["1e-01"] > 0.5
    assert results["template_quality"]["precision"]["median"] > 0
    comparisons = results["identification"]["comparisons"]
    assert comparisons["score"] == "mutual likelihood" and comparisons["low"] < comparisons["high"]
    assert sum(comparisons["genuine"]) == 20 and sum(comparisons["impostor"]) == 380
    page = (out / "report.html").read_text()
    for text in printed, page, (out / "report.md").read_text():
        assert "mutual likelihood" in text and "1/σ², fusion, every image" in text
        assert not any(other in text for other in ("κ", "Eqn", "kappa", "vmf"))
    assert "1/σ² against known severity" in page and "Faces by 1/σ²" in page
    names = {path.name for path in out.glob("*.png")}
    of_kappa = (FigureKind.HISTOGRAM, FigureKind.RELIABILITY)
    assert names == {f"{kind.value}.png" for kind in FigureKind if kind not in of_kappa}
    people = data / "people"
    words = ["identify", "--gallery", people / "gallery", "--probe", people / "probe", "--overwrite"]
    assert run(*words, "--model", tmp_path / model, "--out", out) == 0
    found = json.loads((out / "results.json").read_text())["identification"]
    assert found["precision"]["rank"]["1"] == found["precision_mls"]["rank"]["1"] == 1
    assert list(found)[4:-2] == ["average", "precision", "precision_mls"]


def test_models_of_several_objectives_side_by_side(data, tmp_path, capsys):
    """Each has the rows of its own density; --score auto decides by the likelihood of each."""
    models = [tmp_path / name for name in ("whole", "scalar", "diagonal")]
    words = ["--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    assert run("report", "--model", *models, "--data", data, *words) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    for row in (
        "| whole    | mixed | Eqn (13)          |",
        "| scalar   | mixed | mutual likelihood |",
        "| whole    | κ, Eqn (14)               | Eqn (13)          |",
        "| diagonal | 1/σ², fusion, every image | mutual likelihood |",
        "| whole    | κ            | mixed     |",
        "| scalar   | 1/σ²         | mixed     |",
    ):
        assert printed.count(row) >= 1, row
    assert not any(f"| scalar   | mixed | {label}" in printed for label in ("Eqn (13)", "κ"))
    assert page.count("alt='κ of genuine") == 1 and page.count("alt='1/σ² of genuine") == 2
    entries = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert [entry.get("objective") for entry in entries.values()] == [None, "scf_gaussian", "pfe"]
    mixed = data / "verification" / "mixed.bin"
    assert run("risk", "--model", *models, "--data", mixed, "--score", "auto", *words, "--overwrite") == 0
    entries = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    scores = [entry["reject"]["score"] for entry in entries.values()]
    assert scores == ["Eqn (13)", "mutual likelihood", "mutual likelihood"]
    thresholds = [f"{entry['reject']['threshold']:.4f}" for entry in entries.values()]
    accepted = f"Eqn (13) {thresholds[0]}, mutual likelihood {thresholds[1]}, {thresholds[2]}"
    assert f"accepted above {accepted}, the equal error rate" in capsys.readouterr().out


def test_a_model_file_decides_the_score(tmp_path, monkeypatch):
    """A file as stage 2 writes it, through the embedder that reads it."""
    monkeypatch.setattr(comparison, "open_embedder", open_embedder)
    torch.manual_seed(0)
    states = Backbone("ir_tiny", 24).state_dict(), build_confidence_net("conv", 16, 7, outputs=24).state_dict()
    save_model(tmp_path / "m.pt", *states, radius=64.0, normalization="insightface", objective=Objective.PFE)
    rng, same = np.random.default_rng(0), np.arange(20) % 2 == 0
    identities = [identity for pair in range(20) for identity in (pair, pair if same[pair] else pair + 1000)]
    write_verification_set(tmp_path / "few.bin", (picture(i, 0.3, rng) for i in identities), same)
    words = ["--data", tmp_path / "few.bin", "--out", tmp_path / "out"]
    assert run("verify", "--model", tmp_path / "m.pt", *words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["objective"] == "pfe" and 0 <= results["verification"]["accuracy_mls"] <= 1
    assert "accuracy_vmf" not in results["verification"]


@pytest.mark.parametrize(
    ("model", "score", "message"),
    [
        ("scalar", "vmf", "--score vmf needs kappa, and --model {} is one of SCF-G; take --score mls, auto or cosine"),
        ("whole", "mls", "--score mls needs variances, and --model {} is one of SCF; take --score vmf, auto or cosine"),
        ("alone", "auto", "--score auto needs a confidence, and --model {} is a backbone alone; take --score cosine"),
    ],
)
def test_a_score_that_a_model_does_not_have_is_one_clear_line(model, score, message, data, tmp_path, capsys):
    words = ["--data", data / "templates", "--score", score, "--cache", tmp_path / "cache"]
    assert run("risk", "--model", tmp_path / model, *words) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path / model) in error and error.count("\n") == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["report", "--data", "{data}"],
        ["identify", "--gallery", "{data}/people/gallery", "--probe", "{data}/people/probe"],
    ],
)
def test_a_backbone_alone_has_every_number_that_needs_no_kappa(words, data, tmp_path, capsys):
    words = [word.format(data=data) for word in words]
    for name in "whole", "alone":
        assert run(*words, "--model", tmp_path / name, "--out", tmp_path / "out" / name) == 0
    printed = capsys.readouterr().out.split(str(tmp_path / "out" / "whole"))[1]
    (whole, figures, _), (alone, left, notes) = (
        rows_and_figures(tmp_path / "out" / name) for name in ("whole", "alone")
    )
    assert (
        notes == ["alone is a backbone alone (insightface pixels), so what needs κ is left out."]
        and printed.count(notes[0]) == 1
    )
    needs_kappa = {
        path
        for path in whole
        if any(word in part for part in path for word in ("kappa", "vmf", "comparisons", "reliability"))
    }
    assert (
        alone == {path: value for path, value in whole.items() if path not in needs_kappa}
        and len(alone) > 5
        and needs_kappa
    )
    need_kappa = {"scores.png"}
    if words[0] == "report":
        need_kappa |= {"severity.png", "reliability.png", "kappa_histogram.png", "faces.png"}
    assert figures - left == need_kappa and left < figures
    assert "Eqn" not in printed and printed.count("κ") == 1


def test_a_backbone_alone_beside_a_model(data, tmp_path, capsys):
    assert (
        run("report", "--model", tmp_path / "whole", tmp_path / "alone", "--data", data, "--out", tmp_path / "out") == 0
    )
    page, printed = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    assert page.count("<figcaption>whole") - page.count("<figcaption>alone") == 5
    assert printed.count("| whole | mixed | Eqn (13) |") == 1 and printed.count("| alone | mixed | cosine   |") == 1


@pytest.mark.parametrize(
    "data_set, areas",
    [
        ("templates", {"feature_norm", "detector", "random", "oracle"}),
        ("verification/mixed.bin", {"feature_norm", "random", "oracle"}),
    ],
)
def test_risk_of_a_backbone_alone(data_set, areas, data, tmp_path, capsys):
    arguments = [
        "risk",
        "--model",
        tmp_path / "alone",
        "--data",
        data / data_set,
        "--far",
        "0.1",
        "--cache",
        tmp_path / "cache",
    ]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["reject_area"].keys() == areas
    capsys.readouterr()
    assert run(*arguments[:-2], "--cache", tmp_path / "other", "--score", "vmf") == 2
    assert (
        "alone is a backbone alone; take --score cosine" in capsys.readouterr().err
        and not (tmp_path / "other").exists()
    )


def test_models_side_by_side(data, tmp_path, capsys):
    lfw = data / "verification" / "clean.bin"
    assert (
        run(
            "verify",
            "--model",
            "first=a",
            "second=b",
            "--data",
            lfw,
            "--out",
            tmp_path / "out",
            "--cache",
            tmp_path / "cache",
            "--flip",
        )
        == 0
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"]) == ["first", "second"] and results["request"] | {"data": None} == {
        "command": "verify",
        "model": ["a", "b"],
        "data": None,
        "pairs": 6000,
        "seed": 0,
        "flip": True,
    }
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines == ["model", lines[1], "first", "first", "second", "second"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "model1-det.png",
        "model1-roc.png",
        "model2-det.png",
        "model2-roc.png",
    ]
    assert (tmp_path / "out" / "report.html").read_text().count("<figcaption>second") == 2
    # A report of one model takes the figures of the earlier one away.
    assert (
        run(
            "verify",
            "--model",
            "a",
            "--data",
            lfw,
            "--out",
            tmp_path / "out",
            "--cache",
            tmp_path / "cache",
            "--overwrite",
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["det.png", "roc.png"]


def test_verify_draws_pairs_of_a_folder_of_identities_and_keeps_them(tmp_path, capsys):
    people = tmp_path / "some people"
    for identity in range(20):
        (people / f"person {identity}").mkdir(parents=True)
        for number in range(3):
            (people / f"person {identity}" / f"{number}.png").write_bytes(
                picture(identity, 0.3, np.random.default_rng(100 * identity + number))
            )
    command = ["verify", "--model", tmp_path / "m", "--cache", tmp_path / "cache", "--overwrite"]
    found = []
    for name, data, seed in (
        ("drawn", people, 0),
        ("again", people, 0),
        ("other", people, 1),
        ("read", tmp_path / "drawn" / "pairs-some people.txt", 0),
    ):
        assert run(*command, "--data", data, "--pairs", 60, "--seed", seed, "--out", tmp_path / name) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())["verification"]
        found.append({key: results[key] for key in ("pairs", "accuracy", "accuracy_vmf", "eer", "auc")})
    assert found[0] == found[1] == found[3] and found[0]["pairs"] == 60 and found[0]["accuracy"] > 0.9
    lists = [(tmp_path / name / "pairs-some people.txt").read_text() for name in ("drawn", "again", "other")]
    assert lists[0] == lists[1] != lists[2] and len(lists[0].splitlines()) == 60
    assert f"60 pairs of {people} drawn with seed 0" in (tmp_path / "drawn" / "report.md").read_text()
    capsys.readouterr()
    assert run(*command, "--data", people) == 2
    assert "some people: a fold needs two identities and 300 pairs" in capsys.readouterr().err


def test_ijb_command(data, tmp_path, capsys):
    assert (
        run("ijb", "--model", tmp_path / "m", "--data", data / "templates", "--no-align", "--cache", tmp_path / "cache")
        == 0
    )
    printed = capsys.readouterr().out
    assert "## Templates: tiny, 1:1" in printed and "norm × detector" in printed and "rank 10" in printed
    assert run("ijb", "--model", tmp_path / "m", "--data", data / "templates", data / "templates") == 2
    assert "different protocols" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8(encoding, data, tmp_path, monkeypatch):
    words = ["--data", data / "templates", "--no-align", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("ijb", "--model", f"κ面={tmp_path / 'm'}", f"b={tmp_path / 'n'}", *words) == 0
    terminal.flush()
    printed = terminal.buffer.getvalue().decode(encoding)
    assert f"norm {'x' if encoding == 'ascii' else '×'} detector" in printed and "| k\\u9762" in printed
    assert "κ面" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def slow_log_normalizer(kappa, dim):
    return (dim / 2 - 1) * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - np.log(ive(dim / 2 - 1, kappa)) - kappa


def slow_template_scores(features, weights, protocol, pairs, dim, by_media):
    """Cosine and Eqn (13) of pairs of templates, by the definitions: one template, one medium, one image, one pair
    after another.
    """
    pooled = {}
    for template in set(protocol.template_ids.tolist()):
        total = np.zeros(dim)
        for medium in set(protocol.media_ids[protocol.template_ids == template].tolist()):
            rows = np.flatnonzero((protocol.template_ids == template) & (protocol.media_ids == medium))
            total += (np.mean if by_media else np.sum)(
                [weights[row] * features[row] / np.linalg.norm(features[row]) for row in rows], axis=0
            )
        pooled[template] = total
    first, second = (np.array([pooled[template] for template in column]) for column in zip(*pairs))
    cosines = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    normalizers = (slow_log_normalizer(np.linalg.norm(total, axis=1), dim) for total in (first, second, first + second))
    return cosines, next(normalizers) + next(normalizers) - next(normalizers) - dim * np.log(64)


def slow_tar(scores, same, far):
    impostors = sorted(scores[~same], reverse=True)
    return np.mean(scores[same] > impostors[int(far * len(impostors) + 1e-9)])


def slow_identification(score_of, galleries, subject_of):
    """Rank rates with all galleries together; mean over the galleries of TPIR at FPIR 0.1."""
    everyone = [template for gallery in galleries for template in gallery.gallery_ids.tolist()]
    probes, ranks, tpirs = galleries[0].probe_ids.tolist(), [], []
    for probe in probes:
        by_score = sorted(everyone, key=lambda template: -score_of[probe, template])
        ranks.append([subject_of[template] for template in by_score].index(subject_of[probe]))
    for gallery in galleries:
        best = {
            probe: max(gallery.gallery_ids.tolist(), key=lambda template: score_of[probe, template]) for probe in probes
        }
        enrolled = {subject_of[template] for template in gallery.gallery_ids.tolist()}
        strangers = sorted((score_of[p, best[p]] for p in probes if subject_of[p] not in enrolled), reverse=True)
        threshold = strangers[int(0.1 * len(strangers) + 1e-9)]
        tpirs.append(
            np.mean(
                [
                    subject_of[best[p]] == subject_of[p] and score_of[p, best[p]] > threshold
                    for p in probes
                    if subject_of[p] in enrolled
                ]
            )
        )
    return {str(rank): np.mean(np.array(ranks) < rank) for rank in (1, 5, 10)}, np.mean(tpirs)


def test_templates_against_slow_numpy():
    """300 templates of 100 subjects, 1 to 6 images in 1 to 3 media each: every number of 1:1 and of 1:N."""
    rng = np.random.default_rng(0)
    dim, subjects, templates = 16, 100, 300
    template_ids = np.sort(np.concatenate([np.arange(templates), rng.integers(0, templates, 900)])) * 7 + 3
    media_ids = template_ids * 3 + rng.integers(0, 3, len(template_ids))
    subject_of = {template * 7 + 3: template % subjects for template in range(templates)}
    centers = rng.normal(size=(subjects, dim))
    spread = rng.uniform(0.5, 3, len(template_ids))
    features = np.array([centers[subject_of[t]] for t in template_ids.tolist()]) + spread[:, None] * rng.normal(
        size=(len(template_ids), dim)
    )
    embeddings = Embeddings(torch.from_numpy(features).float(), torch.from_numpy(4 - 2 * np.log(spread)).float())
    ids = np.array(sorted(subject_of))
    first, second = np.triu_indices(templates, 1)
    pairs = np.stack([ids[first], ids[second]], axis=1)[rng.permutation(len(first))[:6000]]
    pairs = np.concatenate([pairs, [[t * 7 + 3, (t + subjects) * 7 + 3] for t in range(2 * subjects)]])
    same = np.array([subject_of[a] == subject_of[b] for a, b in pairs.tolist()])
    names, detector = (
        list(map(str, range(len(template_ids)))),
        rng.uniform(0.5, 1, len(template_ids)).astype(np.float32),
    )
    protocol = TemplateProtocol(names, template_ids, media_ids, None, detector, pairs, same, None)
    enrolled, probes = ids[:subjects], ids[subjects:]
    searched = [np.array([subject_of[t] for t in group.tolist()]) for group in (enrolled[::2], enrolled[1::2], probes)]
    galleries = [
        Gallery(name, enrolled[start::2], searched[start], probes, searched[2])
        for start, name in enumerate(("G1", "G2"))
    ]

    class Store:
        embedder = SimpleNamespace(radius=64.0, device=torch.device("cpu"))

        def load(self, source, name):
            return embeddings

    templates = evaluate.Templates({"slow": datasets.TemplateSet("slow", protocol, None, galleries, None)})
    results = templates.measure(Store()).results.as_json()
    norm = np.linalg.norm(features, axis=1)
    weights = {
        "average": np.ones(len(norm)),
        "norm": norm,
        "detector": detector,
        "norm_detector": norm * detector,
        "kappa": embeddings.kappa,
        "kappa_images": embeddings.kappa,
    }
    comparisons = [(probe, template) for probe in probes.tolist() for template in enrolled.tolist()]
    assert results["templates"]["templates"] == 300 and results["templates"]["genuine_pairs"] == np.count_nonzero(same)
    for name, values in weights.items():
        scores = slow_template_scores(
            features, values, protocol, [*pairs.tolist(), *comparisons], dim, name != "kappa_images"
        )
        for key, column in ((name, 0), *([(f"{name}_vmf", 1)] if name.startswith("kappa") else [])):
            one_to_one, one_to_many = np.split(scores[column], [len(pairs)])
            expected = {f"{far:.0e}": slow_tar(one_to_one, same, far) for far in (0.1, 0.01)}
            assert results["templates"][key] == pytest.approx(expected, abs=1e-12) and 0.3 < expected["1e-02"] < 1
            ranks, tpir = slow_identification(dict(zip(comparisons, one_to_many)), galleries, subject_of)
            assert results["identification"][key]["rank"] == pytest.approx(ranks, abs=1e-12)
            assert results["identification"][key]["tpir_at_fpir"] == pytest.approx({"1e-01": tpir}, abs=1e-12)


def test_identify_command(data, tmp_path, capsys):
    people = data / "people"
    command = [
        "identify",
        "--model",
        tmp_path / "m",
        "--gallery",
        people / "gallery",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
    ]
    assert run(*command, "--probe", people / "probe") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["identification"]
    assert found["enrolled"] == 12 and found["searches"] == 24
    assert found["kappa"]["mated"] == 12 and found["kappa"]["rank"]["1"] == 1
    assert found["kappa_vmf"]["tpir_at_fpir"].keys() == {"1e-01"} or found["kappa_vmf"]["tpir_at_fpir"] == {}
    (tmp_path / "strangers" / "nobody").mkdir(parents=True)
    (tmp_path / "strangers" / "nobody" / "1.png").write_bytes(picture(1, 0.0, np.random.default_rng(0)))
    assert run(*command, "--overwrite", "--probe", tmp_path / "strangers") == 2
    assert "none of the 1 subjects of the probes is in the gallery, such as 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(("score", "model"), [("cosine", "m"), ("vmf", "m"), ("mls", "diagonal")])
def test_risk_command_on_templates(data, tmp_path, score, model, capsys):
    arguments = [
        "risk",
        "--model",
        tmp_path / model,
        "--data",
        data / "templates",
        "--far",
        "0.1",
        "--score",
        score,
        "--cache",
        tmp_path / "cache",
    ]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    areas, confidence = results["reject_area"], "kappa" if model == "m" else "precision"
    assert (
        areas.keys() == {confidence, "feature_norm", "detector", "random", "oracle"}
        and areas["oracle"] < areas[confidence] < areas["random"]
    )
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
    (tmp_path / "out" / "severity.png").write_bytes(b"of an earlier report")
    assert run("report", "--model", tmp_path / "m", "--data", root, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["verification"]["set"] == results["reject"]["set"] == "lfw" and "templates" not in results
    assert results["kappa"]["severity_spearman"] is None
    assert (
        not (tmp_path / "out" / "severity.png").exists()
        and "severity.png" not in (tmp_path / "out" / "report.md").read_text()
    )


def test_templates_alone(data, tmp_path):
    assert run("report", "--model", tmp_path / "m", "--data", data / "templates", "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["reject"]["set"] == "tiny" and "verification" not in results and "identification" in results


def test_published_table():
    average, pooled, every_image = (
        Matcher(Weighting.AVERAGE, Score.COSINE),
        Matcher(Weighting.KAPPA, Score.COSINE),
        Matcher(Weighting.KAPPA_IMAGES, Score.VMF),
    )

    def results(average_rates, kappa_rates):
        tables = {average: average_rates, pooled: kappa_rates, every_image: kappa_rates}
        rates = {matcher: dict(zip(("1e-05", "1e-04"), values)) for matcher, values in tables.items()}
        return Results(templates=BySet("IJB-C", {"IJB-C": TemplateResult(1, 1, 1, 1, rates)}))

    models = {
        "ArcFace": results((0.9315, 0.956), (0.9404, 0.9609)),
        "CosFace": results((0.9386, 0.9595), (0.9478, 0.9622)),
    }
    table = make_tables(models)[-1]
    assert table.header == ["TAR [%]", "IJB-C 1e-05", "IJB-C 1e-04"]
    assert (
        table.rows[:2] == [["ArcFace", "93.15", "95.60"], ["+ SCF", "94.04", "96.09"]] and table.rows[3][0] == "CosFace"
    )
    gaussian = results((0.9386, 0.9595), (0.9478, 0.9622))
    gaussian.objective, rates = Objective.PFE, gaussian.templates.sets["IJB-C"].tar_at_far
    rates[Matcher(Weighting.PRECISION, Score.COSINE)] = rates.pop(pooled)
    rates[Matcher(Weighting.PRECISION_IMAGES, Score.MLS)] = rates.pop(every_image)
    mixed = make_tables({"Arc": models["ArcFace"], "Cos": gaussian})[-1]
    assert [row[0] for row in mixed.rows[3:]] == ["Cos", "+ PFE-G", "+ PFE-G, mutual likelihood"]
    assert mixed.rows[4][1:] == ["94.78", "96.22"]
    assert mixed.about == (
        "The cosine of averaged media; + SCF: of media averaged with κ as weight, Eqn (14); Eqn (13) takes κ summed "
        "over every image; + PFE-G: of media averaged with 1/σ² as weight, PFE's fusion; mutual likelihood takes 1/σ² "
        "summed over every image."
    )
    for matcher in pooled, every_image:
        del models["ArcFace"].templates.sets["IJB-C"].tar_at_far[matcher]  # a backbone alone
    assert [row[0] for row in make_tables(models)[-1].rows] == ["ArcFace", "CosFace", "+ SCF", "+ SCF, Eqn (13)"]


def test_command_guards_the_report(data, tmp_path, capsys):
    arguments = [
        "verify",
        "--data",
        data / "verification" / "clean.bin",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
    ]
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "absent"}, "cannot read the pairs absent"),
        ({"--device": "nonsense"}, "must be a device"),
        ({"--batch-size": "0"}, "at least 1"),
    ],
)
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
    table = Table("Of <both>", ["set", "score"], [["clean", "0.5"], ["lfw", "10.25"]], "about")
    assert table.markdown().splitlines()[2:] == [
        "| set   | score |",
        "| ----- | ----: |",
        "| clean |   0.5 |",
        "| lfw   | 10.25 |",
        "",
        "about",
    ]
    assert "Of &lt;both&gt;" in table_html(table) and "<td class=word>clean</td><td>0.5</td>" in table_html(table)
