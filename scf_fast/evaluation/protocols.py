"""What each protocol measures: verification of pairs and templates, identification, and recognition that may decline a pair."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from kernels.template_pooling import pool_templates
from kernels.vmf_similarity import vmf_similarity_matrix
from pipelines.template_protocol import TemplateProtocol
from scf_fast.evaluation import metrics
from scf_fast.evaluation.embeddings import Embeddings, PairScores, score_pairs

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FPIRS = (1e-1, 1e-2, 1e-3)
RANKS = (1, 5, 10)
_SCORES_AT_ONCE = 1 << 22  # of a search: 32 MiB of float64, about ten of them alive


# ---- pairs ------------------------------------------------------------------------------------------------------------------------------


def score_verification_set(embeddings: Embeddings, radius: float, device: torch.device | str = "cpu") -> PairScores:
    """Scores of pairs k = images 2k and 2k + 1."""
    first = torch.arange(0, len(embeddings.mu), 2)
    return score_pairs(embeddings.mu.to(device), torch.from_numpy(embeddings.kappa).to(device), first, first + 1, radius)


def tar_table(scores: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """TAR by FAR ('1e-03'), for those of FARS that let at least ten impostor pairs pass."""
    measurable = metrics.measurable_fars(FARS, np.count_nonzero(~same))
    return {f"{far:.0e}": tar for far, tar in metrics.tar_at_far(scores, same, measurable).items()}


def summarise_verification(scores: PairScores, same: np.ndarray) -> dict:
    """Ten-fold accuracy, equal error rate, area under the ROC and TAR at FAR by cosine, and (`..._vmf`) by Eqn (13)."""
    summary = {"pairs": len(same)}
    for suffix, values in ("", scores.cosine), ("_vmf", scores.vmf):
        accuracy = metrics.k_fold_accuracy(values, same)
        summary |= {f"accuracy{suffix}": accuracy.mean, f"accuracy{suffix}_std": accuracy.std, f"eer{suffix}": metrics.equal_error_rate(values, same),
                    f"auc{suffix}": metrics.area_under_roc(values, same), f"tar_at_far{suffix}": tar_table(values, same)}
    return summary


# ---- templates --------------------------------------------------------------------------------------------------------------------------


class Pooling(NamedTuple):
    """Templates made of weighted directions, in ascending order of their ids."""

    directions: torch.Tensor  # (T, D) float32
    kappas: torch.Tensor | None  # (T,) float32, where the weights are kappa


def pooling_weights(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[str, np.ndarray]:
    """(N,) weights of the images by way of pooling. "norm" sums the features as they are; with "norm_detector", insightface's default, they
    are scaled by the detector's score. Detector scores that are all one value say nothing and are left out."""
    weights = {"average": np.ones(len(protocol.names)), "norm": embeddings.feature_norm}
    if np.ptp(protocol.detector_score) > 0:
        weights |= {"detector": protocol.detector_score, "norm_detector": embeddings.feature_norm * protocol.detector_score}
    return weights | {"kappa": embeddings.kappa}


def template_ids(protocol: TemplateProtocol) -> np.ndarray:
    """(T,) int64, ascending: the order of the rows of a Pooling."""
    return np.unique(protocol.template_ids)


def pool_protocol(embeddings: Embeddings, protocol: TemplateProtocol, weights: np.ndarray, device: torch.device | str = "cpu",
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (T, D) and lengths of the sums (T,) of the templates, in ascending order of their ids; Eqn (14) where the weights are kappa.

    A template is the sum over its media of the mean over the medium's images of weight mu: a video counts as one picture, as in the IJB
    protocols, whichever the weights.
    """
    _, template_index = np.unique(protocol.template_ids, return_inverse=True)
    media, medium_index = np.unique(protocol.media_ids, return_inverse=True)
    # Within its template, that is: one video may serve two templates.
    _, medium_index, medium_size = np.unique(template_index * len(media) + medium_index, return_inverse=True, return_counts=True)
    weights = torch.from_numpy(weights / medium_size[medium_index]).float()
    return pool_templates(embeddings.mu.to(device), weights.to(device), torch.from_numpy(template_index).to(device))


def pool_every_way(embeddings: Embeddings, protocol: TemplateProtocol, device: torch.device | str = "cpu"):
    """Yields (name, Pooling), one way of pooling at a time."""
    for name, weights in pooling_weights(embeddings, protocol).items():
        directions, kappas = pool_protocol(embeddings, protocol, weights, device)
        yield name, Pooling(directions, kappas if name == "kappa" else None)


def template_rows(protocol: TemplateProtocol, ids: np.ndarray) -> torch.Tensor:
    """Rows of a Pooling that hold these template ids, of any shape."""
    return torch.from_numpy(np.searchsorted(template_ids(protocol), ids))


def score_templates(pooling: Pooling, protocol: TemplateProtocol, radius: float) -> PairScores:
    """Scores (P,) of the protocol's pairs."""
    return score_pairs(*pooling, *template_rows(protocol, protocol.pair_template_ids.T), radius)


def template_quality(embeddings: Embeddings, protocol: TemplateProtocol) -> dict[str, np.ndarray]:
    """(T,) of each measure: kappa of Eqn (14), mean feature norm, mean detector score where that varies."""
    _, index, count = np.unique(protocol.template_ids, return_inverse=True, return_counts=True)

    def mean(values):
        return np.bincount(index, weights=values) / count

    quality = {"kappa": pool_protocol(embeddings, protocol, embeddings.kappa)[1].double().numpy(), "feature_norm": mean(embeddings.feature_norm)}
    return quality | ({"detector": mean(protocol.detector_score)} if np.ptp(protocol.detector_score) > 0 else {})


# ---- identification ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """A 1:N protocol over the templates of a TemplateProtocol: what is enrolled, and what is searched for."""

    name: str
    gallery_ids: np.ndarray  # (G,) int64 template ids, one a subject
    gallery_subjects: np.ndarray  # (G,) int64, no two alike
    probe_ids: np.ndarray  # (Q,) int64 template ids
    probe_subjects: np.ndarray  # (Q,) int64


def read_galleries(root: Path, protocol: TemplateProtocol) -> list[Gallery]:
    """The 1:N files of a protocol's folder as IJB-B (S1, S2) and IJB-C (G1, G2) have them; empty where there are none.

    `meta/<name>_1N_gallery_<S1|S2|G1|G2>.csv` and `meta/<name>_1N_probe_mixed.csv` have one header line and one line an image, of which the
    first two columns count: template id, subject id.

    Raises:
        ValueError: there is a gallery without probes or the other way round, a file is malformed or names a template without images, a
            template has two subjects, or a subject two templates in the galleries.
    """
    galleries = sorted((root / "meta").glob("*_1N_gallery_*.csv"))
    probes = sorted((root / "meta").glob("*_1N_probe_mixed.csv"))
    if not galleries and not probes:
        return []
    if len(probes) != 1 or not galleries:
        raise ValueError(f"{root / 'meta'}: 1:N needs '*_1N_gallery_*.csv' and one '*_1N_probe_mixed.csv', found {len(galleries)} and {len(probes)}; "
                         "restore the files, or remove all of them to leave 1:N out")
    known = template_ids(protocol)
    probe_ids, probe_subjects = _read_subjects(probes[0], known)
    result = []
    for path in galleries:
        ids, subjects = _read_subjects(path, known)
        result.append(Gallery(path.stem.rpartition("_")[2], ids, subjects, probe_ids, probe_subjects))
    subjects, times = np.unique(np.concatenate([gallery.gallery_subjects for gallery in result]), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{root / 'meta'}: the galleries must hold one template a subject between them, got several of {np.count_nonzero(times > 1)} "
                         f"subjects, the first {subjects[times > 1][0]}; repair the files")
    return result


def _read_subjects(path, known):
    """(template ids, subject ids), each template once."""
    rows = {}
    with open(path, newline="") as file:
        reader = csv.reader(file)
        next(reader, None)
        for row in reader:
            try:
                template, subject = int(row[0]), int(row[1])
            except (IndexError, ValueError):
                raise ValueError(f"{path} line {reader.line_num} must start with a template id and a subject id, got {','.join(row)[:80]!r}; "
                                 "repair the line") from None
            if rows.setdefault(template, subject) != subject:
                raise ValueError(f"{path} line {reader.line_num} gives template {template} to subject {subject}, an earlier one to {rows[template]}; "
                                 "repair the lines")
    if not rows:
        raise ValueError(f"{path} must name templates, and is empty; restore the file")
    ids = np.array(list(rows), dtype=np.int64)
    unknown = ids[~np.isin(ids, known)]
    if len(unknown):
        raise ValueError(f"{path} names {len(unknown)} templates without images, the first {unknown[0]}; take all meta files from the same set")
    return ids, np.array(list(rows.values()), dtype=np.int64)


def search(gallery_mu: torch.Tensor, gallery_kappa: torch.Tensor | None, gallery_subjects: np.ndarray, probe_mu: torch.Tensor,
           probe_kappa: torch.Tensor | None, probe_subjects: np.ndarray, radius: float = 1.0) -> metrics.Searches:
    """Compares every probe (Q) with the whole gallery (G), by Eqn (13) where kappa is given and by cosine else, some probes at a time.

    Args:
        gallery_mu, probe_mu: (G, D), (Q, D) floating point, of any length.
        gallery_kappa, probe_kappa: (G,), (Q,), or None.
        gallery_subjects: (G,) int64, no two alike.
        probe_subjects: (Q,) int64.
    """
    by_subject = np.argsort(gallery_subjects)
    place = np.searchsorted(gallery_subjects, probe_subjects, sorter=by_subject).clip(max=len(gallery_subjects) - 1)
    mated = gallery_subjects[by_subject[place]] == probe_subjects
    mate = torch.from_numpy(np.where(mated, by_subject[place], -1)).to(probe_mu.device)
    gallery_mu, probe_mu = F.normalize(gallery_mu.double()), F.normalize(probe_mu.double())
    results = []
    height = max(1, _SCORES_AT_ONCE // len(gallery_mu))
    for start in range(0, len(probe_mu), height):
        rows = slice(start, start + height)
        if gallery_kappa is None:
            scores = probe_mu[rows] @ gallery_mu.T
        else:
            scores = vmf_similarity_matrix(probe_mu[rows], probe_kappa[rows].double(), gallery_mu, gallery_kappa.double(), radius)
        column = mate[rows, None]
        mate_score = torch.where(column < 0, torch.nan, scores.gather(1, column.clamp(min=0)))
        rank = torch.where(column < 0, 0, 1 + (scores > mate_score).sum(dim=1, keepdim=True))
        other = scores.masked_fill(torch.arange(len(gallery_mu), device=scores.device) == column, -torch.inf).amax(dim=1, keepdim=True)
        results.append(torch.cat([mate_score, rank.double(), other], dim=1).cpu())
    mate_score, rank, other = torch.cat(results).T.numpy()
    return metrics.Searches(mate_score, rank.astype(np.int64), other)


def search_templates(pooling: Pooling, protocol: TemplateProtocol, gallery: Gallery, radius: float, score: str) -> metrics.Searches:
    """The searches of a 1:N protocol by "cosine" or, with kappa pooling, by "vmf"."""
    enrolled, probes = template_rows(protocol, gallery.gallery_ids), template_rows(protocol, gallery.probe_ids)
    kappas = (None, None) if score == "cosine" else (pooling.kappas[enrolled], pooling.kappas[probes])
    return search(pooling.directions[enrolled], kappas[0], gallery.gallery_subjects, pooling.directions[probes], kappas[1],
                  gallery.probe_subjects, radius)


def summarise_searches(searches: metrics.Searches) -> dict:
    """Counts, rank rates of the mated searches and, where some are not mated, TPIR at those of FPIRS that ten of them decide."""
    summary = {"searches": len(searches.mated), "mated": int(np.count_nonzero(searches.mated))}
    summary["rank"] = {str(rank): rate for rank, rate in metrics.rank_rates(searches, RANKS).items()}
    fpirs = metrics.measurable_fars(FPIRS, np.count_nonzero(~searches.mated))
    return summary | {"tpir_at_fpir": {f"{fpir:.0e}": tpir for fpir, tpir in metrics.tpir_at_fpir(searches, fpirs).items()} if fpirs else {}}


# ---- quality and rejection --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejection:
    """Error-versus-reject curves of one set of pairs, the decision being score > threshold whatever is rejected."""

    threshold: float
    far: float | None  # where the threshold was put on all pairs; None: at equal error rates
    curves: dict[str, metrics.RejectCurve]  # by rejection order; "oracle" rejects the wrong decisions first


def reject_by_quality(scores: np.ndarray, same: np.ndarray, quality: dict[str, np.ndarray], far: float | None = None) -> Rejection:
    """Rejects pairs by each measure of quality, at random (the expectation over orders), and by an oracle.

    Args:
        scores: (P,), same: (P,) bool.
        quality: (P,) by name, of the lesser of the two images or templates.
        far: false accept rate that fixes the threshold on all pairs; None takes the equal error rate.
    """
    threshold = metrics.equal_error_threshold(scores, same) if far is None else metrics.threshold_at_far(scores, same, far)
    wrong = (scores > threshold) != same
    orders = quality | {"random": np.zeros(len(wrong)), "oracle": 1.0 - wrong}
    return Rejection(threshold, far, {name: metrics.error_versus_reject(wrong, values) for name, values in orders.items()})


def image_quality(embeddings: Embeddings) -> dict[str, np.ndarray]:
    """(N,) of each measure."""
    return {"kappa": embeddings.kappa, "feature_norm": embeddings.feature_norm}


def lower_of_pair(quality: np.ndarray) -> np.ndarray:
    """(2P,) by image -> (P,) the lower value of images 2k and 2k + 1."""
    return quality.reshape(-1, 2).min(axis=1)


def summarise_quality(embeddings: Embeddings, severity: np.ndarray | None) -> dict:
    """Quantiles of kappa and of the feature norm, and their rank correlation with known severity (None: not known, or constant)."""
    summary = {}
    for key, quality in image_quality(embeddings).items():
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
