"""What each protocol measures: verification of pairs and templates, identification, and recognition that may decline a
pair.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from scf_fast.errors import InputError
from scf_fast.evaluation import metrics
from scf_fast.evaluation.embeddings import Embeddings, PairScores, score_pairs
from scf_fast.kernels import (
    neutral_radius,
    pool_templates,
    vmf_similarity_from_cosine,
    vmf_similarity_histogram,
    vmf_similarity_top_k,
)
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, TemplateProtocol

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FPIRS = (1e-1, 1e-2, 1e-3)
RANKS = (1, 5, 10)
_SCORES_AT_ONCE = 1 << 22  # cosines of a search: 32 MiB of float64
_BINS = 512  # of a score histogram


# ---- pairs
# ------------------------------------------------------------------------------------------------------------------------------


def score_verification_set(embeddings: Embeddings, radius: float, device: torch.device | str = "cpu") -> PairScores:
    """Scores of pairs k = images 2k and 2k + 1."""
    first = torch.arange(0, len(embeddings.mu), 2)
    kappa = None if embeddings.kappa is None else torch.from_numpy(embeddings.kappa).to(device)
    return score_pairs(embeddings.mu.to(device), kappa, first, first + 1, radius)


def tar_table(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """TAR by FAR ('1e-03'), for those of FARS that let at least ten impostor pairs pass."""
    measurable = metrics.measurable_fars(FARS, np.count_nonzero(~same))
    return {f"{far:.0e}": tar for far, tar in metrics.tar_at_far(scores, same, measurable).items()}


def summarize_verification(scores: PairScores, same: np.ndarray) -> dict:
    """Ten-fold accuracy, equal error rate, area under the ROC and TAR at FAR by cosine, and (`..._vmf`) by Eqn (13)
    where there is a kappa.
    """
    summary = {"pairs": len(same)}
    for suffix, values in ("", scores.cosine), ("_vmf", scores.vmf):
        if values is None:
            continue
        accuracy = metrics.k_fold_accuracy(values, same)
        summary |= {
            f"accuracy{suffix}": accuracy.mean,
            f"accuracy{suffix}_std": accuracy.std,
            f"eer{suffix}": metrics.equal_error_rate(values, same),
            f"auc{suffix}": metrics.area_under_roc(values, same),
            f"tar_at_far{suffix}": tar_table(values, same),
        }
    return summary


# ---- templates
# --------------------------------------------------------------------------------------------------------------------------


class Pooling(NamedTuple):
    """Templates made of weighted directions, in ascending order of their ids."""

    directions: torch.Tensor  # (T, D) float32
    kappas: torch.Tensor | None  # (T,) float32, where the weights are kappa


def pooling_weights(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[str, np.ndarray]:
    """(N,) weights of the images by way of pooling. "norm" sums the features as they are; with "norm_detector",
    insightface's default, they are scaled by the detector's score. Detector scores that are all one value say nothing
    and are left out, as is kappa where there is none.
    """
    weights = {"average": np.ones(len(protocol.names)), "norm": embeddings.feature_norm}
    if np.ptp(protocol.detector_score) > 0:
        weights |= {
            "detector": protocol.detector_score,
            "norm_detector": embeddings.feature_norm * protocol.detector_score,
        }
    return weights | _kappa_of(embeddings)


def _kappa_of(embeddings: Embeddings) -> dict[str, np.ndarray]:
    return {} if embeddings.kappa is None else {"kappa": embeddings.kappa}


def template_ids(protocol: TemplateProtocol) -> np.ndarray:
    """(T,) int64, ascending: the order of the rows of a Pooling."""
    return np.unique(protocol.template_ids)


def pool_protocol(
    embeddings: Embeddings,
    protocol: TemplateProtocol,
    weights: np.ndarray,
    device: torch.device | str = "cpu",
    by_media: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (T, D) and lengths of the sums (T,) of the templates, in ascending order of their ids; Eqn (14) where
    the weights are kappa.

    By media, a template is the sum over its media of the mean over the medium's images of weight mu: a video counts as
    one picture, as in the IJB protocols, whichever the weights. Otherwise it is the sum over all of its images.
    """
    _, template_index = np.unique(protocol.template_ids, return_inverse=True)
    if by_media:
        media, medium_index = np.unique(protocol.media_ids, return_inverse=True)
        # Within its template, that is: one video may serve two templates.
        _, medium_index, medium_size = np.unique(
            template_index * len(media) + medium_index, return_inverse=True, return_counts=True
        )
        weights = weights / medium_size[medium_index]
    weights = torch.from_numpy(weights).float()
    return pool_templates(embeddings.mu.to(device), weights.to(device), torch.from_numpy(template_index).to(device))


def pool_every_way(embeddings: Embeddings, protocol: TemplateProtocol, device: torch.device | str = "cpu"):
    """Yields (name, Pooling), one way of pooling at a time: by media with each of the weights, then, where there is a
    kappa, "kappa_images", by kappa over all images.
    """
    for name, weights in pooling_weights(embeddings, protocol).items():
        directions, kappas = pool_protocol(embeddings, protocol, weights, device)
        yield name, Pooling(directions, kappas if name == "kappa" else None)
    if embeddings.kappa is not None:
        yield "kappa_images", Pooling(*pool_protocol(embeddings, protocol, embeddings.kappa, device, by_media=False))


def template_rows(protocol: TemplateProtocol, ids: np.ndarray) -> torch.Tensor:
    """Rows of a Pooling that hold these template ids, of any shape."""
    return torch.from_numpy(np.searchsorted(template_ids(protocol), ids))


def score_templates(pooling: Pooling, protocol: TemplateProtocol, radius: float) -> PairScores:
    """Scores (P,) of the protocol's pairs."""
    return score_pairs(*pooling, *template_rows(protocol, protocol.pair_template_ids.T), radius)


def template_quality(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[str, np.ndarray]:
    """(T,) of each measure: kappa of Eqn (14) where there is a kappa, mean feature norm, mean detector score where that
    varies.
    """
    _, index, count = np.unique(protocol.template_ids, return_inverse=True, return_counts=True)

    def mean(values):
        return np.bincount(index, weights=values) / count

    quality = {
        name: pool_protocol(embeddings, protocol, kappa)[1].double().numpy()
        for name, kappa in _kappa_of(embeddings).items()
    }
    quality["feature_norm"] = mean(embeddings.feature_norm)
    return quality | ({"detector": mean(protocol.detector_score)} if np.ptp(protocol.detector_score) > 0 else {})


# ---- identification
# ---------------------------------------------------------------------------------------------------------------------


def search(
    gallery_mu: torch.Tensor,
    gallery_kappa: torch.Tensor | None,
    gallery_subjects: np.ndarray,
    probe_mu: torch.Tensor,
    probe_kappa: torch.Tensor | None,
    probe_subjects: np.ndarray,
    radius: float = 1.0,
    depth: int = max(RANKS),
) -> metrics.Searches:
    """Searches the gallery (G) for every probe (Q), by Eqn (13) where kappa is given and by cosine else; Q x G scores
    never exist at once.

    Args:
        gallery_mu, probe_mu: (G, D), (Q, D) floating point, of any length.
        gallery_kappa, probe_kappa: (G,), (Q,), or None.
        gallery_subjects: (G,) int64, no two alike.
        probe_subjects: (Q,) int64.
        depth: the ranks that are told apart; a mate beyond has rank depth + 1.
    """
    by_subject = np.argsort(gallery_subjects)
    place = np.searchsorted(gallery_subjects, probe_subjects, sorter=by_subject).clip(max=len(gallery_subjects) - 1)
    mated = gallery_subjects[by_subject[place]] == probe_subjects
    mate = np.where(mated, by_subject[place], -1)
    count = min(max(depth, 2), len(gallery_mu))  # the two best, because the best may be the mate
    if gallery_kappa is None:
        scores, rows = _most_similar(gallery_mu, probe_mu, count)
    else:
        neutral = neutral_radius(gallery_mu.shape[1])  # of scores that float32 holds well
        scores, rows = vmf_similarity_top_k(probe_mu, probe_kappa, gallery_mu, gallery_kappa, count, neutral)
        scores = scores.double() + gallery_mu.shape[1] * math.log(neutral / radius)
    scores, rows = scores.cpu().numpy(), rows.cpu().numpy()
    hit = rows == mate[:, None]
    rank = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, depth + 1)
    best_other = np.where(hit, -np.inf, scores).max(axis=1)
    mate_score = np.full(len(mate), np.nan)
    mate_score[mated] = _mate_scores(gallery_mu, gallery_kappa, probe_mu, probe_kappa, mate, mated, radius)
    return metrics.Searches(mate_score, np.where(mated, rank, 0).astype(np.int64), best_other)


def _most_similar(gallery_mu, probe_mu, count):
    """(Q, count) highest cosines, float64, and their rows of the gallery, some probes at a time."""
    gallery_mu, probe_mu = F.normalize(gallery_mu.double()), F.normalize(probe_mu.double())
    bands = [
        torch.topk(rows @ gallery_mu.T, count, dim=1)
        for rows in probe_mu.split(max(1, _SCORES_AT_ONCE // len(gallery_mu)))
    ]
    return torch.cat([band.values for band in bands]), torch.cat([band.indices for band in bands])


def _mate_scores(gallery_mu, gallery_kappa, probe_mu, probe_kappa, mate, mated, radius):
    probes, mates = torch.from_numpy(np.flatnonzero(mated)), torch.from_numpy(mate[mated] + len(probe_mu))
    kappa = None if gallery_kappa is None else torch.cat([probe_kappa, gallery_kappa])
    scores = score_pairs(torch.cat([probe_mu, gallery_mu]), kappa, probes, mates, radius)
    return scores.cosine if kappa is None else scores.vmf


def search_templates(
    pooling: Pooling, protocol: TemplateProtocol, gallery: Gallery, radius: float, score: str
) -> metrics.Searches:
    """The searches of a 1:N protocol by "cosine" or, with kappa pooling, by "vmf"."""
    enrolled, probes = template_rows(protocol, gallery.gallery_ids), template_rows(protocol, gallery.probe_ids)
    kappas = (None, None) if score == "cosine" else (pooling.kappas[enrolled], pooling.kappas[probes])
    return search(
        pooling.directions[enrolled],
        kappas[0],
        gallery.gallery_subjects,
        pooling.directions[probes],
        kappas[1],
        gallery.probe_subjects,
        radius,
    )


def summarize_searches(searches: metrics.Searches) -> dict:
    """Counts, rank rates of the mated searches and, where some are not mated, TPIR at those of FPIRS that ten of them
    decide.
    """
    summary = {"searches": len(searches.mated), "mated": int(np.count_nonzero(searches.mated))}
    summary["rank"] = {str(rank): rate for rank, rate in metrics.rank_rates(searches, RANKS).items()}
    fpirs = metrics.measurable_fars(FPIRS, np.count_nonzero(~searches.mated))
    return summary | {
        "tpir_at_fpir": {f"{fpir:.0e}": tpir for fpir, tpir in metrics.tpir_at_fpir(searches, fpirs).items()}
        if fpirs
        else {}
    }


@dataclass(frozen=True)
class ScoreHistogram:
    """Eqn (13) of every probe with every gallery entry, as log likelihood ratio against chance (nats)."""

    edges: np.ndarray  # (B + 1,) float64
    impostor: np.ndarray  # (B,) int64 comparisons of two subjects
    genuine: np.ndarray  # (B,) int64 comparisons of one

    def summary(self) -> dict:
        """What results.json has of it."""
        return {
            "low": float(self.edges[0]),
            "high": float(self.edges[-1]),
            "genuine": self.genuine.tolist(),
            "impostor": self.impostor.tolist(),
        }


def score_histogram(
    gallery_mu: torch.Tensor,
    gallery_kappa: torch.Tensor,
    gallery_subjects: np.ndarray,
    probe_mu: torch.Tensor,
    probe_kappa: torch.Tensor,
    probe_subjects: np.ndarray,
) -> ScoreHistogram:
    """Counts all Q x G scores, which never exist at once: over the range that they can have, then over the range that
    they do have.

    Args:
        as in search; kappa finite.
    """
    dim = gallery_mu.shape[1]
    faces = [
        probe_mu,
        probe_kappa,
        torch.from_numpy(probe_subjects).to(probe_mu.device),
        gallery_mu,
        gallery_kappa,
        torch.from_numpy(gallery_subjects).to(gallery_mu.device),
    ]
    largest = torch.stack([probe_kappa.max(), gallery_kappa.max()]).double().cpu()
    same, opposite = vmf_similarity_from_cosine(
        torch.tensor([1.0, -1.0], dtype=torch.float64), *largest, dim, neutral_radius(dim)
    ).tolist()
    edges = np.linspace(
        min(opposite, 0.0), max(same, 0.0) + 1e-3, _BINS + 1
    )  # 1e-3: of two uniform distributions all scores are 0
    for _ in range(2):
        counts = (
            vmf_similarity_histogram(*faces, float(edges[0]), float(edges[-1]), _BINS, neutral_radius(dim))
            .cpu()
            .numpy()
        )
        used = np.flatnonzero(counts.any(axis=0))
        result = ScoreHistogram(edges, *counts)
        edges = np.linspace(edges[used[0]], edges[used[-1] + 1], _BINS + 1)
    return result


# ---- quality and rejection
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejection:
    """Error-versus-reject curves of one set of pairs, the decision being score > threshold whatever is rejected."""

    threshold: float
    far: float | None  # where the threshold was put on all pairs; None: at equal error rates
    curves: dict[str, metrics.RejectCurve]  # by rejection order; "oracle" rejects the wrong decisions first


def reject_by_quality(
    scores: np.ndarray, same: np.ndarray, quality: dict[str, np.ndarray], far: float | None = None
) -> Rejection:
    """Rejects pairs by each measure of quality, at random (the expectation over orders), and by an oracle.

    Args:
        scores: (P,), same: (P,) bool.
        quality: (P,) by name, of the lesser of the two images or templates.
        far: false accept rate that fixes the threshold on all pairs; None takes the equal error rate.
    """
    threshold = (
        metrics.equal_error_threshold(scores, same) if far is None else metrics.threshold_at_far(scores, same, far)
    )
    wrong = (scores > threshold) != same
    orders = quality | {"random": np.zeros(len(wrong)), "oracle": 1.0 - wrong}
    return Rejection(
        threshold, far, {name: metrics.error_versus_reject(wrong, values) for name, values in orders.items()}
    )


def image_quality(embeddings: Embeddings) -> dict[str, np.ndarray]:
    """(N,) of each measure that there is."""
    return _kappa_of(embeddings) | {"feature_norm": embeddings.feature_norm}


def lower_of_pair(quality: np.ndarray) -> np.ndarray:
    """(2P,) by image -> (P,) the lower value of images 2k and 2k + 1."""
    return quality.reshape(-1, 2).min(axis=1)


def summarize_quality(embeddings: Embeddings, severity: np.ndarray | None) -> dict:
    """Quantiles of kappa and of the feature norm, and their rank correlation with known severity (None: not known, or
    constant).
    """
    summary = {}
    for key, quality in image_quality(embeddings).items():
        p05, median, p95 = np.quantile(quality, (0.05, 0.5, 0.95)).tolist()
        varies = severity is not None and np.ptp(quality) > 0 and np.ptp(severity) > 0
        spearman = float(spearmanr(quality, severity).statistic) if varies else None
        summary[key] = {"p05": p05, "median": median, "p95": p95, "severity_spearman": spearman}
    return summary


def read_severity(path: Path, column: str, names: list[str]) -> np.ndarray:
    """(N,) float64 degradation severity in [0, 1] of each name, from a CSV with the columns `column` and 'severity', in
    any order of rows.

    Raises:
        ValueError: a column or a name is missing, or a severity is not a number in [0, 1].
    """
    with open(path, newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        if not {column, "severity"} <= set(reader.fieldnames or ()):
            raise InputError(
                f"{path} must have the columns {column} and severity, got {reader.fieldnames}; write it anew with the "
                "data set"
            )
        try:
            severity = {row[column]: float(row["severity"]) for row in reader}
        except (TypeError, ValueError, csv.Error):
            raise InputError(f"{path} line {reader.line_num}: severity must be a number; repair the row") from None
    missing = [name for name in names if name not in severity]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(names)} images, the first {missing[0]}; write it anew with the data "
            "set"
        )
    values = np.array([severity[name] for name in names])
    outside = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(outside):
        raise InputError(
            f"{path}: severity must lie in [0, 1], got {values[outside[0]]} for {names[outside[0]]}; repair the row"
        )
    return values
