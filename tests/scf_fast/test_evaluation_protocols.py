import numpy as np
import pytest
import torch

from kernels.vmf_similarity import vmf_similarity
from pipelines.sources import EncodedImages
from pipelines.template_protocol import TemplateProtocol
from scf_fast.evaluation import embeddings as embeddings_module
from scf_fast.evaluation import protocols
from scf_fast.evaluation.embeddings import Embeddings, pair_cosine, pair_vmf


def random_embeddings(count, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(5 * torch.randn(count, dim, generator=generator), 3 + torch.randn(count, generator=generator))


def test_pairs_are_scored_alike_in_pieces(monkeypatch):
    e = random_embeddings(10)
    first, second = torch.tensor([0, 3, 3, 9, 2, 5, 7]), torch.tensor([1, 4, 3, 0, 8, 6, 7])
    monkeypatch.setattr(embeddings_module, "_PAIRS_AT_ONCE", 3)
    kappas = torch.from_numpy(e.kappa)
    cosines, vmfs = pair_cosine(e.mu, first, second), pair_vmf(e.mu, kappas, first, second, radius=32.0)
    f = e.features.double().numpy()
    for i, j, cosine, vmf in zip(first.tolist(), second.tolist(), cosines, vmfs, strict=True):
        # mu is float32: its rounding, not the score's arithmetic, is what the tolerance covers.
        assert cosine == pytest.approx(f[i] @ f[j] / np.linalg.norm(f[i]) / np.linalg.norm(f[j]), abs=3e-7)
        expected = vmf_similarity(e.features[i:i + 1].double(), kappas[i:i + 1], e.features[j:j + 1].double(), kappas[j:j + 1], radius=32.0)
        assert vmf == pytest.approx(expected.item(), abs=1e-3)
    assert cosines[2] == pytest.approx(1, abs=1e-12)


def test_a_set_pairs_its_neighbouring_images():
    e = random_embeddings(6)
    scores = protocols.score_verification_set(e, radius=64.0)
    f = torch.nn.functional.normalize(e.features.double()).numpy()
    np.testing.assert_allclose(scores.cosine, (f[0::2] * f[1::2]).sum(axis=1), atol=3e-7)


def loop_over_templates(e, protocol, by_kappa):
    """Direction and kappa by template id, by the definition: the sum over media of the medium's mean."""
    pooled = {}
    for template in set(protocol.template_ids.tolist()):
        total = np.zeros(e.features.shape[1])
        for medium in set(protocol.media_ids[protocol.template_ids == template].tolist()):
            rows = np.flatnonzero((protocol.template_ids == template) & (protocol.media_ids == medium))
            vectors = [e.mu[row].double().numpy() * (e.kappa[row] if by_kappa else 1.0) for row in rows]
            total += sum(vectors) / len(vectors)
        pooled[template] = total / np.linalg.norm(total), np.linalg.norm(total)
    return pooled


def test_templates_against_a_loop():
    rng = np.random.default_rng(4)
    count = 40
    template_ids = np.concatenate([[900, 17, -4], rng.choice([900, 17, -4], count - 3)])
    protocol = TemplateProtocol(
        [f"{i}.jpg" for i in range(count)], template_ids, rng.choice([5, 6, 10**9], count), None, None,
        np.array([[900, 17], [17, -4], [900, 900]]), np.array([True, False, True]), EncodedImages([b""] * count))
    e = random_embeddings(count)
    scores = protocols.score_templates(e, protocol, radius=64.0)
    assert scores.keys() == {"average", "kappa", "kappa_vmf"}
    for key, by_kappa in ("average", False), ("kappa", True):
        pooled = loop_over_templates(e, protocol, by_kappa)
        np.testing.assert_allclose(scores[key], [pooled[a][0] @ pooled[b][0] for a, b in protocol.pair_template_ids], atol=1e-6)
    for (a, b), score in zip(protocol.pair_template_ids.tolist(), scores["kappa_vmf"]):
        (mu1, kappa1), (mu2, kappa2) = ((torch.tensor(mu)[None], torch.tensor([kappa])) for mu, kappa in (pooled[a], pooled[b]))
        assert score == pytest.approx(vmf_similarity(mu1, kappa1, mu2, kappa2).item(), abs=1e-4)


def test_a_confident_frame_outweighs_blurred_ones():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    e = Embeddings(features, torch.tensor([300.0, 1.0, 1.0, 300.0]).log())
    protocol = TemplateProtocol(list("abcd"), np.array([1, 1, 1, 2]), np.array([1, 2, 3, 4]), None, None, np.array([[1, 2]]), np.array([True]), None)
    scores = protocols.score_templates(e, protocol, radius=64.0)
    assert scores["average"] == pytest.approx(1 / np.sqrt(5)) and scores["kappa"] > 0.9999


def test_summary_of_a_verification_set():
    same = np.arange(40) % 2 == 0
    cosine = np.where(same, 0.8, 0.1)
    cosine[[1, 2]] = 0.9, 0.05  # one impostor above every genuine pair, one genuine pair below every impostor
    scores = protocols.PairScores(cosine, np.where(same, -1000.0, -1200.0))
    summary = protocols.summarise_verification(scores, same)
    assert summary["pairs"] == 40
    assert summary["accuracy"] == pytest.approx(38 / 40) and summary["accuracy_vmf"] == 1 and summary["accuracy_vmf_std"] == 0
    assert summary["tar_at_far"] == {}  # 20 impostors measure no FAR of at most 0.1
    assert protocols.tar_table(np.tile(cosine, 5), np.tile(same, 5)) == {"1e-01": 0.95}


def test_rejection_against_brute_force():
    e = random_embeddings(120, seed=3)
    rng = np.random.default_rng(0)
    same = np.arange(60) % 2 == 0
    cosine = rng.normal(loc=0.8 * same)
    rejection = protocols.reject_by_quality(cosine, same, e)
    wrong = (cosine > rejection.threshold) != same
    false_accepts, false_rejects = wrong[~same].sum(), wrong[same].sum()
    assert abs(false_accepts - false_rejects) <= 1 and wrong.any()
    for order, quality in ("kappa", e.kappa), ("feature_norm", e.feature_norm):
        curve = rejection.curves[order]
        lower = [min(quality[2 * k], quality[2 * k + 1]) for k in range(60)]
        for rejected in range(60):
            kept = sorted(range(60), key=lower.__getitem__)[rejected:]
            assert curve.error[rejected] == pytest.approx(wrong[kept].mean()) and curve.rejected[rejected] == pytest.approx(rejected / 60)
    assert rejection.curves["oracle"].error[wrong.sum()] == 0
    assert rejection.curves["oracle"].area < min(curve.area for order, curve in rejection.curves.items() if order != "oracle")


def test_quality_falls_with_severity():
    e = Embeddings(torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([5.0, 4.0, 1.0]))
    summary = protocols.summarise_quality(e, np.array([0.1, 0.5, 0.9]))
    assert summary["kappa"]["severity_spearman"] == pytest.approx(-1) and summary["feature_norm"]["severity_spearman"] == pytest.approx(-0.5)
    assert summary["kappa"]["median"] == pytest.approx(np.exp(4)) and summary["feature_norm"]["median"] == 2
    for severity in (None, np.zeros(3)):
        assert protocols.summarise_quality(e, severity)["kappa"]["severity_spearman"] is None


def test_severity_by_name(tmp_path):
    path = tmp_path / "severity.csv"
    path.write_text("name,identity,severity\nb.jpg,1,0.75\na.jpg,0,0.25\nc.jpg,2,1\n")
    assert protocols.read_severity(path, "name", ["a.jpg", "b.jpg"]).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("text", "message"), [
    ("image,identity\n", "columns name and severity"),
    ("", "columns name and severity"),
    ("name,severity\na,low\n", "line 2: severity must be a number"),
    ("name,severity\na\n", "line 2: severity must be a number"),
    ("name,severity\na,nan\n", "must lie in .* got nan for a"),
    ("name,severity\na,1.5\n", "must lie in .* got 1.5 for a"),
    ("name,severity\nb,0.5\n", "lacks 1 of 1 images, the first a"),
])
def test_severity_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "severity.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        protocols.read_severity(path, "name", ["a"])
