"""Quality of images, pairs and templates: its distribution, its relation to known degradation, and recognition that may
decline a pair.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scf_fast.errors import InputError
from scf_fast.evaluation import metrics
from scf_fast.evaluation.results import DENSITY_MEASURES, Quality, QualityQuantiles, QualityResult
from scf_fast.held_out import Held, Reliability, measure_reliability
from scf_fast.inference import Embeddings
from scf_fast.pipelines.evaluation_sets.template_protocol import TemplateProtocol
from scf_fast.pipelines.formats.text_file import read_text
from scf_fast.pipelines.text import shown


@dataclass(frozen=True)
class Rejection:
    """Error-versus-reject curves of one set of pairs, the decision being score > threshold whatever is rejected."""

    threshold: float
    far: float | None  # where the threshold was put on all pairs; None: at equal error rates
    curves: dict[Quality, metrics.RejectCurve]  # by rejection order; the oracle rejects the wrong decisions first


def reject_by_quality(
    scores: np.ndarray, same: np.ndarray, quality: dict[Quality, np.ndarray], far: float | None = None
) -> Rejection:
    """Rejects pairs by each measure of quality, at random (the expectation over orders), and by an oracle.

    Args:
        scores: (P,), same: (P,) bool.
        quality: (P,) each, of the lesser of the two images or templates.
        far: false accept rate that fixes the threshold on all pairs; None takes the equal error rate.
    """
    threshold = (
        metrics.equal_error_threshold(scores, same) if far is None else metrics.threshold_at_far(scores, same, far)
    )
    wrong = (scores > threshold) != same
    orders = quality | {Quality.RANDOM: np.zeros(len(wrong)), Quality.ORACLE: 1.0 - wrong}
    return Rejection(
        threshold, far, {order: metrics.error_versus_reject(wrong, values) for order, values in orders.items()}
    )


def image_quality(embeddings: Embeddings) -> dict[Quality, np.ndarray]:
    """Returns (N,) of each measure that there is: the confidence, where the model gives one, and the feature norm."""
    quality = {}
    if embeddings.confidence is not None:
        quality[DENSITY_MEASURES[embeddings.density].quality] = embeddings.confidence
    return quality | {Quality.FEATURE_NORM: embeddings.feature_norm}


def lower_of_pair(quality: np.ndarray) -> np.ndarray:
    """Converts (2P,) by image to (P,), the lower value of images 2k and 2k + 1."""
    return quality.reshape(-1, 2).min(axis=1)


def summarize_quality(
    embeddings: Embeddings, severity: np.ndarray | None, people: np.ndarray | None = None
) -> QualityResult:
    """Computes quantiles of the confidence and of the feature norm, their rank correlation with known severity, and the
    reliability of kappa.

    Args:
        severity: (N,) known degradation of the images, or None.
        people: (N,) the person of each image, -1 for one to leave out; None leaves the reliability out.
    """
    measures = {}
    for measure, values in image_quality(embeddings).items():
        p05, median, p95 = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
        correlation = None
        if severity is not None and np.ptp(values) > 0 and np.ptp(severity) > 0:
            from scipy.stats import spearmanr  # here: it takes a second to import

            correlation = float(spearmanr(values, severity).statistic)
        measures[measure] = QualityQuantiles(p05, median, p95, correlation)
    return QualityResult(measures, None if people is None else _reliability(embeddings, people))


def _reliability(embeddings: Embeddings, people: np.ndarray) -> Reliability | None:
    """Compares kappa with the cosines of the images of a person; None where that cannot be told."""
    if embeddings.kappa is None:
        return None  # a backbone alone, or the model of a Gaussian
    chosen = np.flatnonzero(people >= 0)
    held = Held(embeddings.mu.numpy()[chosen], np.asarray(embeddings.kappa, np.float64)[chosen], people[chosen])
    try:
        return measure_reliability(held)
    except InputError:  # too few genuine pairs, or a model that knows nobody; the other measures say so
        return None


def people_of_pairs(same: np.ndarray) -> np.ndarray:
    """Returns (2P,) a person for each image of P pairs: a number of its own for every genuine pair, and -1."""
    return np.where(same, np.arange(len(same)), -1).repeat(2)


def people_of_templates(protocol: TemplateProtocol) -> np.ndarray:
    """Returns (N,) the person of each image: templates that a genuine comparison joins show one. Of the images of a
    medium the first stands for all: frames of one video resemble each other more than kappa says.
    """
    from scipy.sparse import coo_array  # here: it takes half a second to import
    from scipy.sparse.csgraph import connected_components

    ids, template = np.unique(protocol.template_ids, return_inverse=True)
    first, second = np.searchsorted(ids, protocol.pair_template_ids[protocol.pair_labels]).T
    joined = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(len(ids),) * 2)
    person = connected_components(joined, directed=False)[1][template].astype(np.int64)
    _, first_of_medium = np.unique([person, protocol.media_ids], axis=1, return_index=True)
    people = np.full(len(person), -1)
    people[first_of_medium] = person[first_of_medium]
    return people


def _is_filled(row: dict) -> bool:
    return any(isinstance(value, str) and value.strip() for value in row.values())


def read_severity(path: Path, column: str, names: list[str]) -> np.ndarray:
    """Reads (N,) float64 degradation severities in [0, 1] by name, from a CSV with its rows in any order.

    Args:
        column: of the names; the severities are in the column 'severity'.
        names: whose severities are wanted, in this order.
    Raises:
        InputError: a column or a name is missing, or a severity is not a number in [0, 1].
    """
    reader = csv.DictReader(io.StringIO(read_text(path)))
    try:
        if not {column, "severity"} <= set(reader.fieldnames or ()):
            raise InputError(
                f"{path} must have the columns {column} and severity, got {shown(reader.fieldnames)}; write it again "
                "with the data set"
            )
        severity = {row[column]: float(row["severity"]) for row in reader if _is_filled(row)}
    except (TypeError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} line {reader.line_num}: severity must be a number; repair the row") from None
    missing = [name for name in names if name not in severity]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(names)} images, the first {missing[0]}; write it again with the data "
            "set"
        )
    values = np.array([severity[name] for name in names])
    outside = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(outside):
        raise InputError(
            f"{path}: severity must lie in [0, 1], got {values[outside[0]]} for {names[outside[0]]}; repair the row"
        )
    return values
