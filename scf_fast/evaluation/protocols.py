"""Measurements of each protocol: verification of pairs, 1:1 of templates, and 1:N identification."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from scf_fast.evaluation import metrics
from scf_fast.evaluation.pair_scores import PairScores, score_pairs
from scf_fast.evaluation.results import (
    PairMeasures,
    Quality,
    Rates,
    Score,
    ScoreHistogram,
    SearchResult,
    VerificationResult,
    Weighting,
)
from scf_fast.inference import Embeddings
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


def score_verification_set(embeddings: Embeddings, radius: float, device: torch.device | str = "cpu") -> PairScores:
    """Scores pairs k = images 2k and 2k + 1."""
    first = torch.arange(0, len(embeddings.mu), 2)
    kappa = None if embeddings.kappa is None else torch.from_numpy(embeddings.kappa).to(device)
    return score_pairs(embeddings.mu.to(device), kappa, first, first + 1, radius)


def tar_table(scores: np.ndarray, same: np.ndarray) -> Rates:
    """Computes TAR by FAR ('1e-03'), for those of FARS that let at least ten impostor pairs pass."""
    measurable = metrics.measurable_fars(FARS, np.count_nonzero(~same))
    return {f"{far:.0e}": tar for far, tar in metrics.tar_at_far(scores, same, measurable).items()}


def summarize_verification(scores: PairScores, same: np.ndarray) -> VerificationResult:
    """Computes ten-fold accuracy, equal error rate, area under the ROC and TAR at FAR by each score."""
    by_score = {}
    for score, values in scores.by_score().items():
        accuracy = metrics.k_fold_accuracy(values, same)
        by_score[score] = PairMeasures(
            accuracy.mean,
            accuracy.std,
            metrics.equal_error_rate(values, same),
            metrics.area_under_roc(values, same),
            tar_table(values, same),
        )
    return VerificationResult(len(same), by_score)


# ---- templates


class Pooling(NamedTuple):
    """Templates made of weighted directions, in ascending order of their ids."""

    directions: torch.Tensor  # (T, D) float32
    kappas: torch.Tensor | None  # (T,) float32, where the weights are kappa


def pooling_weights(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[Weighting, np.ndarray]:
    """Returns (N,) weights of the images for each way of pooling by media.

    NORM sums the features as they are; NORM_DETECTOR, insightface's default, scales them by the detector's score.
    Detector scores that are all one value say nothing and are left out, as is kappa where there is none.
    """
    weights = {Weighting.AVERAGE: np.ones(len(protocol.names)), Weighting.NORM: embeddings.feature_norm}
    if np.ptp(protocol.detector_score) > 0:
        weights |= {
            Weighting.DETECTOR: protocol.detector_score,
            Weighting.NORM_DETECTOR: embeddings.feature_norm * protocol.detector_score,
        }
    return weights | ({} if embeddings.kappa is None else {Weighting.KAPPA: embeddings.kappa})


def template_ids(protocol: TemplateProtocol) -> np.ndarray:
    """Returns (T,) int64, ascending: the order of the rows of a Pooling."""
    return np.unique(protocol.template_ids)


def pool_protocol(
    embeddings: Embeddings,
    protocol: TemplateProtocol,
    weights: np.ndarray,
    device: torch.device | str = "cpu",
    by_media: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools templates; with kappa as weights this is Eqn (14).

    By media, a template is the sum over its media of the mean over the medium's images of weight times mu: a video
    counts as one picture, as in the IJB protocols, whichever the weights. Otherwise it is the sum over all its images.

    Returns:
        Directions (T, D) and lengths of the sums (T,), in ascending order of the template ids.
    """
    _, template_index = np.unique(protocol.template_ids, return_inverse=True)
    if by_media:
        media, medium_index = np.unique(protocol.media_ids, return_inverse=True)
        # A medium counts within its template: one video may serve two templates.
        _, medium_index, medium_size = np.unique(
            template_index * len(media) + medium_index, return_inverse=True, return_counts=True
        )
        weights = weights / medium_size[medium_index]
    image_weights = torch.from_numpy(weights).float().to(device)
    return pool_templates(embeddings.mu.to(device), image_weights, torch.from_numpy(template_index).to(device))


def pool_every_way(
    embeddings: Embeddings, protocol: TemplateProtocol, device: torch.device | str = "cpu"
) -> Iterator[tuple[Weighting, Pooling]]:
    """Yields one way of pooling at a time: by media with each of the weights, then, where there is a kappa, by kappa
    over all images.
    """
    for weighting, weights in pooling_weights(embeddings, protocol).items():
        directions, kappas = pool_protocol(embeddings, protocol, weights, device)
        yield weighting, Pooling(directions, kappas if weighting is Weighting.KAPPA else None)
    if embeddings.kappa is not None:
        pooled = pool_protocol(embeddings, protocol, embeddings.kappa, device, by_media=False)
        yield Weighting.KAPPA_IMAGES, Pooling(*pooled)


def template_rows(protocol: TemplateProtocol, ids: np.ndarray) -> torch.Tensor:
    """Returns the rows of a Pooling that hold these template ids, of any shape."""
    return torch.from_numpy(np.searchsorted(template_ids(protocol), ids))


def score_templates(pooling: Pooling, protocol: TemplateProtocol, radius: float) -> PairScores:
    """Scores the protocol's P pairs."""
    first, second = template_rows(protocol, protocol.pair_template_ids.T)
    return score_pairs(pooling.directions, pooling.kappas, first, second, radius)


def template_quality(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[Quality, np.ndarray]:
    """Returns (T,) of each measure: kappa of Eqn (14) where there is a kappa, mean feature norm, and the mean detector
    score where that varies.
    """
    _, index, count = np.unique(protocol.template_ids, return_inverse=True, return_counts=True)
    quality = {}
    if embeddings.kappa is not None:
        quality[Quality.KAPPA] = pool_protocol(embeddings, protocol, embeddings.kappa)[1].double().numpy()
    quality[Quality.FEATURE_NORM] = np.bincount(index, weights=embeddings.feature_norm) / count
    if np.ptp(protocol.detector_score) > 0:
        quality[Quality.DETECTOR] = np.bincount(index, weights=protocol.detector_score) / count
    return quality


# ---- identification


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
    """Searches the gallery (G) for every probe (Q), by Eqn (13) where both have a kappa and by cosine otherwise.

    The Q x G scores never exist at once.

    Args:
        gallery_mu, probe_mu: (G, D), (Q, D) floating point, of any length.
        gallery_kappa, probe_kappa: (G,), (Q,), or None.
        gallery_subjects: (G,) int64, all distinct.
        probe_subjects: (Q,) int64.
        radius: of the sphere.
        depth: the ranks that are told apart; a mate beyond has rank depth + 1.
    """
    by_subject = np.argsort(gallery_subjects)
    place = np.searchsorted(gallery_subjects, probe_subjects, sorter=by_subject).clip(max=len(gallery_subjects) - 1)
    mated = gallery_subjects[by_subject[place]] == probe_subjects
    mate = np.where(mated, by_subject[place], -1)
    count = min(max(depth, 2), len(gallery_mu))  # the two best, because the best may be the mate
    if gallery_kappa is None or probe_kappa is None:
        top_scores, top_rows = _most_similar(gallery_mu, probe_mu, count)
        kappa = None
    else:
        neutral = neutral_radius(gallery_mu.shape[1])  # keeps scores small, so that float32 holds them well
        top_scores, top_rows = vmf_similarity_top_k(probe_mu, probe_kappa, gallery_mu, gallery_kappa, count, neutral)
        top_scores = top_scores.double() + gallery_mu.shape[1] * math.log(neutral / radius)
        kappa = torch.cat([probe_kappa, gallery_kappa])
    scores, rows = top_scores.cpu().numpy(), top_rows.cpu().numpy()
    hit = rows == mate[:, None]
    rank = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, depth + 1)
    best_other = np.where(hit, -np.inf, scores).max(axis=1)
    mate_score = np.full(len(mate), np.nan)
    probes, mates = torch.from_numpy(np.flatnonzero(mated)), torch.from_numpy(mate[mated] + len(probe_mu))
    mate_pairs = score_pairs(torch.cat([probe_mu, gallery_mu]), kappa, probes, mates, radius)
    mate_score[mated] = mate_pairs.cosine if mate_pairs.vmf is None else mate_pairs.vmf
    return metrics.Searches(mate_score, np.where(mated, rank, 0).astype(np.int64), best_other)


def _most_similar(gallery_mu: torch.Tensor, probe_mu: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (Q, count) highest cosines, float64, and their rows of the gallery, computed some probes at a time."""
    gallery_mu, probe_mu = F.normalize(gallery_mu.double()), F.normalize(probe_mu.double())
    bands = [
        torch.topk(rows @ gallery_mu.T, count, dim=1)
        for rows in probe_mu.split(max(1, _SCORES_AT_ONCE // len(gallery_mu)))
    ]
    return torch.cat([band.values for band in bands]), torch.cat([band.indices for band in bands])


def search_templates(
    pooling: Pooling, protocol: TemplateProtocol, gallery: Gallery, radius: float, score: Score
) -> metrics.Searches:
    """Runs the searches of a 1:N protocol by cosine or, where templates were pooled by kappa, by Eqn (13)."""
    enrolled, probes = template_rows(protocol, gallery.gallery_ids), template_rows(protocol, gallery.probe_ids)
    kappas = None if score is Score.COSINE else pooling.kappas
    return search(
        pooling.directions[enrolled],
        None if kappas is None else kappas[enrolled],
        gallery.gallery_subjects,
        pooling.directions[probes],
        None if kappas is None else kappas[probes],
        gallery.probe_subjects,
        radius,
    )


def summarize_searches(searches: metrics.Searches) -> SearchResult:
    """Computes rank rates of the mated searches and, where some are not mated, TPIR at those of FPIRS that ten of them
    decide.
    """
    fpirs = metrics.measurable_fars(FPIRS, np.count_nonzero(~searches.mated))
    tpirs = metrics.tpir_at_fpir(searches, fpirs) if fpirs else {}
    return SearchResult(
        searches=len(searches.mated),
        mated=int(np.count_nonzero(searches.mated)),
        rank={str(rank): rate for rank, rate in metrics.rank_rates(searches, RANKS).items()},
        tpir_at_fpir={f"{fpir:.0e}": tpir for fpir, tpir in tpirs.items()},
    )


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
    largest_probe, largest_gallery = torch.stack([probe_kappa.max(), gallery_kappa.max()]).double().cpu()
    same, opposite = vmf_similarity_from_cosine(
        torch.tensor([1.0, -1.0], dtype=torch.float64), largest_probe, largest_gallery, dim, neutral_radius(dim)
    ).tolist()
    # 1e-3: of two uniform distributions all scores are 0.
    edges = np.linspace(min(opposite, 0.0), max(same, 0.0) + 1e-3, _BINS + 1)
    for _ in range(2):
        counts = vmf_similarity_histogram(
            probe_mu,
            probe_kappa,
            torch.from_numpy(probe_subjects).to(probe_mu.device),
            gallery_mu,
            gallery_kappa,
            torch.from_numpy(gallery_subjects).to(gallery_mu.device),
            float(edges[0]),
            float(edges[-1]),
            _BINS,
            neutral_radius(dim),
        )
        impostor, genuine = counts.cpu().numpy()
        result = ScoreHistogram(edges, impostor, genuine)
        used = np.flatnonzero(impostor + genuine)
        edges = np.linspace(edges[used[0]], edges[used[-1] + 1], _BINS + 1)
    return result
