"""The whole evaluation of one model on one data folder, from files to report."""

import time
from pathlib import Path

import numpy as np

from pipelines.template_protocol import TemplateProtocol, read_template_protocol
from pipelines.verification_set import VerificationSet, read_verification_set
from scf_fast.evaluation import plots, protocols, report
from scf_fast.evaluation.embeddings import embed_images


def evaluate(model, data: Path, out: Path, *, name: str, **loading) -> dict:
    """Measures a model on the verification sets and the template protocol of a data folder, and writes the report.

    Args:
        model: scf_fast.model.SCF on the device in `loading`.
        data: folder with `verification/*.bin` and `templates/`, or one of them, of aligned 112 x 112 faces; known severities in
            `verification/<set>.csv` and `templates/severity.csv`, where there are some. The set named 'clean', else the first by name,
            gives the numbers at the top of "verification"; quality and rejection are measured on the set named 'mixed', else on that.
        out: report folder, made if missing; a report in it is replaced.
        name: what the report calls the model.
        loading: device, batch_size, backend, num_workers, flip of embed_images.
    Returns:
        What results.json holds: "verification", "kappa", "feature_norm", "reject", "reject_area" from the pairs, "templates" and
        "template_quality" from the templates, "seconds", and under "notes" what had to be left out.
    Raises:
        ValueError: data that is missing or malformed; all but the pictures are checked before the first is embedded, and nothing is
            written to `out` until everything is measured.
    """
    started = time.perf_counter()
    sets = {path.stem: read_verification_set(path) for path in sorted((data / "verification").glob("*.bin"))}
    protocol = read_template_protocol(data / "templates") if (data / "templates").is_dir() else None
    if not sets and protocol is None:
        raise ValueError(f"{data} must hold verification/*.bin or templates/meta; give --data the folder that has them")
    for key, pairs in sets.items():
        _check_pairs(data / "verification" / f"{key}.bin", pairs.same)
    if protocol is not None:
        _check_pairs(data / "templates", protocol.pair_labels)
    headline = "clean" if "clean" in sets else next(iter(sets), None)
    mixed = "mixed" if "mixed" in sets else headline
    notes: list[str] = []
    if sets:
        names = [str(image) for image in range(len(sets[mixed].source))]
        severity = _severity(data / "verification" / f"{mixed}.csv", "image", names, notes)
    if protocol is not None:
        template_severity = _severity(data / "templates" / "severity.csv", "name", protocol.names, notes)

    embedded = {key: embed_images(model, pairs.source, key, **loading) for key, pairs in sets.items()}
    if protocol is not None:
        template_embeddings = embed_images(model, protocol.source, "templates", **loading)

    results = {"model": name, "data": str(data)}
    if sets:
        scores = {key: protocols.score_verification_set(embeddings, model.radius) for key, embeddings in embedded.items()}
        rejection = protocols.reject_by_quality(scores[mixed].cosine, sets[mixed].same, embedded[mixed])
        results["verification"] = _verification(sets, scores, headline)
        results |= protocols.summarise_quality(embedded[mixed], severity) | _rejection(mixed, rejection)
    if protocol is not None:
        template_scores = protocols.score_templates(template_embeddings, protocol, model.radius)
        results["templates"] = _templates(protocol, template_scores)
        results["template_quality"] = protocols.summarise_quality(template_embeddings, template_severity)

    report.prepare_folder(out)
    if sets:
        plots.plot_roc(out / report.ROC, "Verification", {
            (key, label): (values, sets[key].same) for key in sets for label, values in zip((report.COSINE, report.VMF), scores[key])})
        plots.plot_rejection(out / report.REJECT, rejection)
        kappa = embedded[mixed].kappa
        plots.plot_kappa_histogram(out / report.HISTOGRAM, protocols.lower_of_pair(kappa), sets[mixed].same)
        plots.plot_faces(out / report.FACES, sets[mixed].source, kappa, severity)
        if severity is not None:
            plots.plot_severity(out / report.SEVERITY, kappa, severity, results["kappa"]["severity_spearman"])
    if protocol is not None:
        plots.plot_roc(out / report.TEMPLATES, "Template verification", {
            (f"{pooling} pooling", score): (template_scores[key], protocol.pair_labels) for key, (pooling, score) in report.POOLINGS.items()})
    results |= {"notes": notes, "seconds": {"evaluation": time.perf_counter() - started}}
    report.write_report(out, results)
    return results


def _check_pairs(what: Path, same: np.ndarray) -> None:
    genuine = np.count_nonzero(same)
    if len(same) < 10 or genuine in (0, len(same)):
        raise ValueError(f"{what} must have at least 10 pairs, genuine and impostor ones among them, got {len(same)} with {genuine} genuine; "
                         "leave it out")


def _severity(path: Path, column: str, names: list[str], notes: list[str]) -> np.ndarray | None:
    if path.exists():
        return protocols.read_severity(path, column, names)
    notes.append(f"{path} does not exist, so no correlation with known severity is given for those images.")
    return None


def _verification(sets: dict[str, VerificationSet], scores: dict[str, protocols.PairScores], headline: str) -> dict:
    summaries = {key: protocols.summarise_verification(scores[key], pairs.same) for key, pairs in sets.items()}
    top = {"set": headline} | summaries.pop(headline)
    clash = top.keys() & summaries.keys()
    if clash:
        raise ValueError(f"verification sets must not be named like a result, got {', '.join(sorted(clash))}; rename those .bin files")
    return top | summaries


def _rejection(key: str, rejection: protocols.Rejection) -> dict:
    errors = {order: [curve.error_at(fraction) for fraction in report.REJECTED] for order, curve in rejection.curves.items()}
    return {
        "reject_area": {order: curve.area for order, curve in rejection.curves.items()},
        "reject": {"set": key, "threshold": rejection.threshold, "rejected": report.REJECTED, "error": errors},
    }


def _templates(protocol: TemplateProtocol, scores: dict[str, np.ndarray]) -> dict:
    same = protocol.pair_labels
    return {key: protocols.tar_table(values, same) for key, values in scores.items()} | {
        "images": len(protocol.names), "templates": len(np.unique(protocol.template_ids)),
        "genuine_pairs": int(np.count_nonzero(same)), "impostor_pairs": int(np.count_nonzero(~same))}
