from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.training.stage2_features import draw
from scf_fast.evaluation import quality
from scf_fast.evaluation.results import Quality
from scf_fast.inference import Embeddings


def random_embeddings(count, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(5 * torch.randn(count, dim, generator=generator), 3 + torch.randn(count, generator=generator))


def test_rejection_against_brute_force():
    e = random_embeddings(120, seed=3)
    rng = np.random.default_rng(0)
    same = np.arange(60) % 2 == 0
    cosine = rng.normal(loc=0.8 * same)
    rejection = quality.reject_by_quality(
        cosine, same, {measure: quality.lower_of_pair(values) for measure, values in quality.image_quality(e).items()}
    )
    wrong = (cosine > rejection.threshold) != same
    false_accepts, false_rejects = wrong[~same].sum(), wrong[same].sum()
    assert abs(false_accepts - false_rejects) <= 1 and wrong.any()
    for order, values in (Quality.KAPPA, e.kappa), (Quality.FEATURE_NORM, e.feature_norm):
        curve = rejection.curves[order]
        lower = [min(values[2 * k], values[2 * k + 1]) for k in range(60)]
        for rejected in range(60):
            kept = sorted(range(60), key=lower.__getitem__)[rejected:]
            assert curve.error[rejected] == pytest.approx(wrong[kept].mean()) and curve.rejected[
                rejected
            ] == pytest.approx(rejected / 60)
    assert rejection.curves[Quality.ORACLE].error[wrong.sum()] == 0
    assert rejection.curves[Quality.ORACLE].area < min(
        curve.area for order, curve in rejection.curves.items() if order is not Quality.ORACLE
    )


def test_rejection_at_a_given_far():
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    scores = rng.normal(loc=2 * same)
    rejection = quality.reject_by_quality(scores, same, {Quality.KAPPA: rng.random(400)}, far=0.05)
    assert np.mean(scores[~same] > rejection.threshold) == 0.05 and rejection.far == 0.05
    assert rejection.curves.keys() == {Quality.KAPPA, Quality.RANDOM, Quality.ORACLE}
    assert rejection.curves[Quality.RANDOM].area == pytest.approx(np.mean((scores > rejection.threshold) != same))


def test_quality_falls_with_severity():
    e = Embeddings(torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([5.0, 4.0, 1.0]))
    summary = quality.summarize_quality(e, np.array([0.1, 0.5, 0.9])).as_json()
    assert summary["kappa"]["severity_spearman"] == pytest.approx(-1) and summary["feature_norm"][
        "severity_spearman"
    ] == pytest.approx(-0.5)
    assert summary["kappa"]["median"] == pytest.approx(np.exp(4)) and summary["feature_norm"]["median"] == 2
    for severity in (None, np.zeros(3)):
        assert quality.summarize_quality(e, severity).measures[Quality.KAPPA].severity_spearman is None


def test_severity_by_name(tmp_path):
    path = tmp_path / "severity.csv"
    path.write_text("name,identity,severity\nb.jpg,1,0.75\na.jpg,0,0.25\nc.jpg,2,1\n")
    assert quality.read_severity(path, "name", ["a.jpg", "b.jpg"]).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,identity\n", "columns name and severity"),
        ("", "columns name and severity"),
        ("name,severity\na,low\n", "line 2: severity must be a number"),
        ("name,severity\na\n", "line 2: severity must be a number"),
        ("name,severity\na," + "9" * 200_000, "severity must be a number"),  # more than the CSV reader takes
        ("name,severity\n\xff,0.5\n", "lacks 1 of 1 images, the first a"),
        ("name,severity\na,nan\n", "must lie in .* got nan for a"),
        ("name,severity\na,1.5\n", "must lie in .* got 1.5 for a"),
        ("name,severity\nb,0.5\n", "lacks 1 of 1 images, the first a"),
    ],
)
def test_severity_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "severity.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        quality.read_severity(path, "name", ["a"])


def test_people_of_pairs_are_the_two_of_a_genuine_pair():
    assert quality.people_of_pairs(np.array([True, False, True])).tolist() == [0, 0, -1, -1, 2, 2]


def test_people_of_templates_are_joined_by_genuine_comparisons():
    """Templates 30 and 10 show one person through 20; of a medium's images the first stands for all."""
    protocol = SimpleNamespace(
        template_ids=np.array([10, 10, 10, 20, 30, 40, 40]),
        media_ids=np.array([5, 5, 6, 7, 6, 8, 9]),
        pair_template_ids=np.array([[10, 20], [20, 30], [30, 40]]),
        pair_labels=np.array([True, True, False]),
    )
    people = quality.people_of_templates(protocol)
    assert people.tolist() == [0, -1, 0, 0, -1, 1, 1]


def test_reliability_of_pairs_finds_the_factor_on_kappa():
    """Images drawn with one kappa, said to be twice it."""
    images = draw(32, 1, 200, 2, 7)
    told = torch.full((400,), 2 * images.fitting_kappa)
    people = quality.people_of_pairs(np.ones(200, dtype=bool))
    found = quality.summarize_quality(Embeddings(images.mu, told.log()), None, people)
    assert found.reliability.factor == pytest.approx(0.5, abs=0.04)
    kept = found.as_json()["reliability"]
    assert np.mean(kept["observed"]) == pytest.approx(images.cos.mean().item(), abs=0.04)
    assert kept["kappa"] == pytest.approx([told[0].item()] * 10, rel=1e-6)
    assert np.mean(np.abs(np.subtract(kept["observed"], kept["predicted"]))) == pytest.approx(kept["error"])
    nobody = quality.people_of_pairs(np.zeros(200, dtype=bool))
    for embeddings, who in ((Embeddings(images.mu, told.log()), nobody), (Embeddings(images.mu), people)):
        assert "reliability" not in quality.summarize_quality(embeddings, None, who).as_json()
