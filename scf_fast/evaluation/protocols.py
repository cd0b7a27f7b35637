"""What each protocol measures: verification of pairs, of templates, and recognition that may decline a pair."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

from kernels.template_pooling import pool_templates
from pipelines.template_protocol import TemplateProtocol
from scf_fast.evaluation import metrics
from scf_fast.evaluation.embeddings import Embeddings, pair_cosine, pair_vmf

FARS = (1e-1, 1e-2, 1e-3, 1e-4)


class PairScores(NamedTuple):
    cosine: np.ndarray  # (P,) float64
    vmf: np.ndarray  # (P,) float64, Eqn (13), nats


def score_verification_set(embeddings: Embeddings, radius: float) -> PairScores:
    """Scores of pairs k = images 2k and 2k + 1."""
    mu, kappa = embeddings.mu, torch.from_numpy(embeddings.kappa)
    first = torch.arange(0, len(mu), 2)
    return PairScores(pair_cosine(mu, first, first + 1), pair_vmf(mu, kappa, first, first + 1, radius))


def tar_table(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """TAR by FAR ('1e-03'), for those of FARS that let at least ten impostor pairs pass."""
    measurable = metrics.measurable_fars(FARS, np.count_nonzero(~same))
    return {f"{far:.0e}": tar for far, tar in metrics.tar_at_far(scores, same, measurable).items()}


def summarise_verification(scores: PairScores, same: np.ndarray) -> dict:
    """Ten-fold accuracy and TAR at FAR by cosine, and (`..._vmf`) by Eqn (13)."""
    summary = {"pairs": len(same)}
    for suffix, values in ("", scores.cosine), ("_vmf", scores.vmf):
        accuracy = metrics.k_fold_accuracy(values, same)
        summary |= {f"accuracy{suffix}": accuracy.mean, f"accuracy{suffix}_std": accuracy.std, f"tar_at_far{suffix}": tar_table(values, same)}
    return summary


def pool_protocol(embeddings: Embeddings, protocol: TemplateProtocol, *, by_kappa: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (T, D) and kappas (T,) of the templates, in ascending order of their ids.

    A template is the sum over its media of the mean over the medium's images of mu (average pooling) or kappa mu (Eqn (14)): a video
    counts as one picture, as in the IJB protocols, whichever the weights.
    """
    _, template_index = np.unique(protocol.template_ids, return_inverse=True)
    media, medium_index = np.unique(protocol.media_ids, return_inverse=True)
    # Within its template, that is: one video may serve two templates.
    _, medium_index, medium_size = np.unique(template_index * len(media) + medium_index, return_inverse=True, return_counts=True)
    weights = (embeddings.kappa if by_kappa else 1.0) / medium_size[medium_index]
    return pool_templates(embeddings.mu, torch.from_numpy(weights), torch.from_numpy(template_index))


def score_templates(embeddings: Embeddings, protocol: TemplateProtocol, radius: float) -> dict[str, np.ndarray]:
    """Scores (P,) of the protocol's pairs: cosine after "average" and after "kappa" pooling, and Eqn (13) after the latter, "kappa_vmf"."""
    first, second = torch.from_numpy(np.searchsorted(np.unique(protocol.template_ids), protocol.pair_template_ids.T))
    average, _ = pool_protocol(embeddings, protocol, by_kappa=False)
    directions, kappas = pool_protocol(embeddings, protocol, by_kappa=True)
    return {"average": pair_cosine(average, first, second), "kappa": pair_cosine(directions, first, second),
            "kappa_vmf": pair_vmf(directions, kappas, first, second, radius)}


@dataclass(frozen=True)
class Rejection:
    """Error-versus-reject curves of one set, the decision being cosine > threshold whatever is rejected."""

    threshold: float  # cosine of equal error rate on all pairs
    curves: dict[str, metrics.RejectCurve]  # by rejection order; "oracle" rejects the wrong decisions first


def reject_by_quality(cosine: np.ndarray, same: np.ndarray, embeddings: Embeddings) -> Rejection:
    """Rejects pairs by the lower kappa, or feature norm, of their two images, at random (mean of 100 orders), and by an oracle."""
    threshold = metrics.equal_error_threshold(cosine, same)
    wrong = (cosine > threshold) != same
    return Rejection(threshold, {
        "kappa": metrics.error_versus_reject(wrong, lower_of_pair(embeddings.kappa)),
        "feature_norm": metrics.error_versus_reject(wrong, lower_of_pair(embeddings.feature_norm)),
        "random": metrics.random_reject(wrong),
        "oracle": metrics.error_versus_reject(wrong, 1.0 - wrong),
    })


def lower_of_pair(quality: np.ndarray) -> np.ndarray:
    """(2P,) by image -> (P,) the lower value of images 2k and 2k + 1."""
    return quality.reshape(-1, 2).min(axis=1)


def summarise_quality(embeddings: Embeddings, severity: np.ndarray | None) -> dict:
    """Quantiles of kappa and of the feature norm, and their rank correlation with known severity (None: not known, or constant)."""
    summary = {}
    for key, quality in ("kappa", embeddings.kappa), ("feature_norm", embeddings.feature_norm):
        p05, median, p95 = np.quantile(quality, (0.05, 0.5, 0.95)).tolist()
        varies = severity is not None and np.ptp(quality) > 0 and np.ptp(severity) > 0
        spearman = float(spearmanr(quality, severity).statistic) if varies else None
        summary[key] = {"p05": p05, "median": median, "p95": p95, "severity_spearman": spearman}
    return summary


def read_severity(path: Path, column: str, names: list[str]) -> np.ndarray:
    """(N,) float64 degradation severity in [0, 1] of each name, from a CSV with the columns `column` and 'severity', in any order of rows.

    Raises:
        ValueError: a column or a name is missing, or a severity is not a number in [0, 1].
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if not {column, "severity"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns {column} and severity, got {reader.fieldnames}; write it anew with the data set")
        try:
            severity = {row[column]: float(row["severity"]) for row in reader}
        except (TypeError, ValueError):
            raise ValueError(f"{path} line {reader.line_num}: severity must be a number; repair the row") from None
    missing = [name for name in names if name not in severity]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(names)} images, the first {missing[0]}; write it anew with the data set")
    values = np.array([severity[name] for name in names])
    outside = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(outside):
        raise ValueError(f"{path}: severity must lie in [0, 1], got {values[outside[0]]} for {names[outside[0]]}; repair the row")
    return values
