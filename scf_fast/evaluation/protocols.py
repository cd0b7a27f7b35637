"""Measurements of each protocol: verification of pairs, 1:1 of templates, and 1:N identification."""

from collections.abc import Iterator

import numpy as np
import torch

from scf_fast.evaluation import metrics
from scf_fast.evaluation.likelihoods import Faces, Likelihood, Similarity
from scf_fast.evaluation.pair_scores import PairScores, score_pairs
from scf_fast.evaluation.results import (
    PairMeasures,
    Quality,
    Rates,
    SearchResult,
    VerificationResult,
    Weighting,
)
from scf_fast.inference import Embeddings
from scf_fast.kernels import pool_templates
from scf_fast.pipelines.evaluation_sets.template_protocol import Gallery, TemplateProtocol

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FPIRS = (1e-1, 1e-2, 1e-3)
RANKS = (1, 5, 10)


def faces_of(embeddings: Embeddings, likelihood: Likelihood | None) -> Faces:
    """Returns images as directions, with their concentrations where there is a likelihood."""
    return Faces(embeddings.mu) if likelihood is None else likelihood.faces_of(embeddings)


# ---- pairs


def score_verification_set(
    embeddings: Embeddings, likelihood: Likelihood | None, device: torch.device | str = "cpu"
) -> PairScores:
    """Scores pairs k = images 2k and 2k + 1."""
    first = torch.arange(0, len(embeddings.mu), 2)
    return score_pairs(faces_of(embeddings, likelihood).to(device), first, first + 1, likelihood)


def tar_table(scores: np.ndarray, same: np.ndarray) -> Rates:
    """Computes TAR by FAR ('1e-03'), for those of FARS that let at least ten impostor pairs pass."""
    measurable = metrics.measurable_fars(FARS, np.count_nonzero(~same))
    return {f"{far:.0e}": tar for far, tar in metrics.tar_at_far(scores, same, measurable).items()}


def summarize_verification(scores: PairScores, same: np.ndarray) -> VerificationResult:
    """Computes ten-fold accuracy, equal error rate, area under the ROC and TAR at FAR by each score."""
    by_score = {}
    for score, values in scores.items():
        accuracy = metrics.k_fold_accuracy(values, same)
        by_score[score] = PairMeasures(
            accuracy.mean,
            accuracy.std,
            metrics.equal_error_rate(values, same),
            metrics.area_under_roc(values, same),
            tar_table(values, same),
        )
    return VerificationResult(len(same), by_score)


def note_on_few_impostors(name: str, same: np.ndarray) -> list[str]:
    """Returns what a set's impostor pairs are too few for; nothing where they are enough."""
    count = np.count_nonzero(~same)
    if count >= metrics.FEW_IMPOSTORS:
        return []
    return [
        f"{name} has {count} impostor pairs: TAR at FAR below {10 / count:.2g} is left out, since it takes ten of them "
        "that pass, and curves start where none does."
        if count > 10
        else f"{name} has {count} impostor pairs, and TAR at FAR takes more than ten; curves start where none passes."
    ]


# ---- templates


def pooling_weights(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[Weighting, np.ndarray]:
    """Returns (N,) weights of the images for each way of pooling by media, without those by confidence.

    NORM sums the features as they are; NORM_DETECTOR, insightface's default, scales them by the detector's score.
    Detector scores that are all one value say nothing and are left out.
    """
    weights = {Weighting.AVERAGE: np.ones(len(protocol.names)), Weighting.NORM: embeddings.feature_norm}
    if np.ptp(protocol.detector_score) > 0:
        weights |= {
            Weighting.DETECTOR: protocol.detector_score,
            Weighting.NORM_DETECTOR: embeddings.feature_norm * protocol.detector_score,
        }
    return weights


def template_ids(protocol: TemplateProtocol) -> np.ndarray:
    """Returns (T,) int64, ascending: the order of pooled templates."""
    return np.unique(protocol.template_ids)


def pool_protocol(
    embeddings: Embeddings, protocol: TemplateProtocol, weights: np.ndarray, device: torch.device | str = "cpu"
) -> Faces:
    """Pools templates by media: a template is the sum over its media of the mean over the medium's images of weight
    times mu.

    A video counts as one picture, as in the IJB protocols, whichever the weights.

    Args:
        weights: (N,) of the images.
    Returns:
        Directions (T, D), in ascending order of the template ids, without a concentration.
    """
    ids, template_index = np.unique(protocol.template_ids, return_inverse=True)
    image_weights = torch.from_numpy(weights / _medium_sizes(protocol)).float().to(device)
    index = torch.from_numpy(template_index).to(device)
    return Faces(pool_templates(embeddings.mu.to(device), image_weights, index, len(ids))[0])


def pool_by_confidence(
    embeddings: Embeddings,
    protocol: TemplateProtocol,
    likelihood: Likelihood,
    device: torch.device | str = "cpu",
    by_media: bool = True,
) -> Faces:
    """Pools templates as the density has it, by media as in :func:`pool_protocol`, or else over all images.

    Returns:
        T templates, in ascending order of their ids.
    """
    ids, template_index = np.unique(protocol.template_ids, return_inverse=True)
    faces = likelihood.faces_of(embeddings)
    if by_media:
        assert faces.concentration is not None
        sizes = torch.from_numpy(_medium_sizes(protocol)).to(faces.concentration.dtype)
        sizes = sizes if faces.concentration.ndim == 1 else sizes[:, None]
        faces = Faces(faces.mu, faces.concentration / sizes)
    return likelihood.pool(faces.to(device), torch.from_numpy(template_index).to(device), len(ids))


def _medium_sizes(protocol: TemplateProtocol) -> np.ndarray:
    """Returns (N,) int64, the number of images that the image's medium has in its template."""
    _, template_index = np.unique(protocol.template_ids, return_inverse=True)
    media, medium_index = np.unique(protocol.media_ids, return_inverse=True)
    # A medium counts within its template: one video may serve two templates.
    _, medium_index, medium_size = np.unique(
        template_index * len(media) + medium_index, return_inverse=True, return_counts=True
    )
    return medium_size[medium_index]


def pool_every_way(
    embeddings: Embeddings,
    protocol: TemplateProtocol,
    likelihood: Likelihood | None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Weighting, Faces]]:
    """Yields one way of pooling at a time: by media with each of the weights, then, where there is a likelihood, by
    confidence by media and over all images.
    """
    for weighting, weights in pooling_weights(embeddings, protocol).items():
        yield weighting, pool_protocol(embeddings, protocol, weights, device)
    if likelihood is not None:
        yield likelihood.measures.by_media, pool_by_confidence(embeddings, protocol, likelihood, device)
        yield (
            likelihood.measures.every_image,
            pool_by_confidence(embeddings, protocol, likelihood, device, by_media=False),
        )


def template_rows(protocol: TemplateProtocol, ids: np.ndarray) -> torch.Tensor:
    """Returns the rows of pooled templates that hold these template ids, of any shape."""
    return torch.from_numpy(np.searchsorted(template_ids(protocol), ids))


def score_templates(pooled: Faces, protocol: TemplateProtocol, likelihood: Likelihood | None) -> PairScores:
    """Scores the protocol's P pairs."""
    first, second = template_rows(protocol, protocol.pair_template_ids.T)
    return score_pairs(pooled, first, second, likelihood)


def template_quality(
    embeddings: Embeddings, protocol: TemplateProtocol, likelihood: Likelihood | None
) -> dict[Quality, np.ndarray]:
    """Returns (T,) of each measure: the confidence of templates pooled by it, by media, where there is one, the mean
    feature norm, and the mean detector score where that varies.
    """
    _, index, count = np.unique(protocol.template_ids, return_inverse=True, return_counts=True)
    quality = {}
    if likelihood is not None:
        confidence = pool_by_confidence(embeddings, protocol, likelihood).confidence
        assert confidence is not None
        quality[likelihood.measures.quality] = confidence
    quality[Quality.FEATURE_NORM] = np.bincount(index, weights=embeddings.feature_norm) / count
    if np.ptp(protocol.detector_score) > 0:
        quality[Quality.DETECTOR] = np.bincount(index, weights=protocol.detector_score) / count
    return quality


# ---- identification


def search(
    gallery: Faces,
    gallery_subjects: np.ndarray,
    probes: Faces,
    probe_subjects: np.ndarray,
    similarity: Similarity,
    depth: int = max(RANKS),
) -> metrics.Searches:
    """Searches the gallery (G) for every probe (Q). The Q x G scores never exist at once.

    Args:
        gallery_subjects: (G,) int64, all distinct.
        probe_subjects: (Q,) int64.
        similarity: for a likelihood, both sets must have concentrations.
        depth: the ranks that are told apart; a mate beyond has rank depth + 1.
    """
    by_subject = np.argsort(gallery_subjects)
    place = np.searchsorted(gallery_subjects, probe_subjects, sorter=by_subject).clip(max=len(gallery_subjects) - 1)
    mated = gallery_subjects[by_subject[place]] == probe_subjects
    mate = np.where(mated, by_subject[place], -1)
    count = min(max(depth, 2), len(gallery.mu))  # the two best, because the best may be the mate
    scores, rows = (found.cpu().numpy() for found in similarity.find_most_similar(gallery, probes, count))
    hit = rows == mate[:, None]
    rank = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, depth + 1)
    best_other = np.where(hit, -np.inf, scores).max(axis=1)
    mate_score = np.full(len(mate), np.nan)
    mated_probes, mates = torch.from_numpy(np.flatnonzero(mated)), torch.from_numpy(mate[mated] + len(probes.mu))
    mate_score[mated] = score_pairs(probes.followed_by(gallery), mated_probes, mates, similarity)[similarity.score]
    return metrics.Searches(mate_score, np.where(mated, rank, 0).astype(np.int64), best_other)


def search_templates(
    pooled: Faces, protocol: TemplateProtocol, gallery: Gallery, similarity: Similarity
) -> metrics.Searches:
    """Runs the searches of a 1:N protocol."""
    enrolled, probes = template_rows(protocol, gallery.gallery_ids), template_rows(protocol, gallery.probe_ids)
    return search(
        pooled.select(enrolled), gallery.gallery_subjects, pooled.select(probes), gallery.probe_subjects, similarity
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
