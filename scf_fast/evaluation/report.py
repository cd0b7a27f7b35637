"""Tables of an evaluation as text, and the report folder: results.json, report.md and the figures it shows."""

import json
from pathlib import Path

from pipelines.files import atomic_output

RESULTS_FILE = "results.json"
REPORT_FILE = "report.md"
REJECTED = (0.0, 0.1, 0.2, 0.5)  # fractions shown in the table of error-versus-reject

ROC, TEMPLATES, REJECT, SEVERITY, HISTOGRAM, FACES = (
    f"{figure}.png" for figure in ("roc", "templates", "reject", "severity", "kappa_histogram", "faces"))
COSINE, VMF = "cosine", "Eqn (13)"
POOLINGS = {"average": ("average", COSINE), "kappa": ("κ", COSINE), "kappa_vmf": ("κ", VMF)}  # key: pooling and score
_ORDERS = {"kappa": "κ", "feature_norm": "feature norm", "random": "random", "oracle": "oracle"}
_FIGURES = {
    ROC: "Verification ROC", TEMPLATES: "Template verification ROC", REJECT: "Error versus reject", SEVERITY: "κ against known severity",
    HISTOGRAM: "κ of genuine and impostor pairs", FACES: "Faces by κ",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, so that it also reads well as plain text; numbers belong right, the first column left."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in (header, *rows)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: dict) -> str:
    """Every section of the results that is there, as Markdown that is fit for a terminal."""
    sections = []
    if "verification" in results:
        sections.append("## Verification\n\n" + _verification_table(results["verification"]))
    if "templates" in results:
        sections.append("## Templates\n\n" + _templates_table(results["templates"]))
    if "kappa" in results or "template_quality" in results:
        sections.append("## Quality\n\n" + _quality_table(results))
    if "reject" in results:
        sections.append("## Error versus reject\n\n" + _reject_table(results))
    if results["notes"]:
        sections.append("\n".join(f"* {note}" for note in results["notes"]))
    return "\n\n".join(sections)


def _verification_table(verification: dict) -> str:
    sets = {verification["set"]: verification} | {name: value for name, value in verification.items() if isinstance(value, dict) and "pairs" in value}
    fars = sorted({far for summary in sets.values() for far in summary["tar_at_far"]}, key=float, reverse=True)
    rows = []
    for name, summary in sets.items():
        for score, suffix in (COSINE, ""), (VMF, "_vmf"):
            accuracy = f"{summary[f'accuracy{suffix}']:.4f} ± {summary[f'accuracy{suffix}_std']:.4f}"
            tars = [_fraction(summary[f"tar_at_far{suffix}"].get(far)) for far in fars]
            rows.append([name, score, str(summary["pairs"]), accuracy, *tars])
    return table(["set", "score", "pairs", "10-fold accuracy", *(f"TAR @ FAR {far}" for far in fars)], rows)


def _templates_table(templates: dict) -> str:
    fars = list(templates["average"])
    rows = [[pooling, score, *(_fraction(templates[key][far]) for far in fars)] for key, (pooling, score) in POOLINGS.items()]
    counts = (f"{templates['images']} images in {templates['templates']} templates; {templates['genuine_pairs']} genuine and "
              f"{templates['impostor_pairs']} impostor comparisons. The images of one medium are averaged first, with the same weights.")
    return table(["pooling", "score", *(f"TAR @ FAR {far}" for far in fars)], rows) + "\n\n" + counts


def _quality_table(results: dict) -> str:
    images = {f"{results['reject']['set']} set": results} if "reject" in results else {}
    if "template_quality" in results:
        images["templates"] = results["template_quality"]
    rows = [[_ORDERS[key], label, *(f"{quality[key][level]:.4g}" for level in ("p05", "median", "p95")),
             _fraction(quality[key]["severity_spearman"])] for label, quality in images.items() for key in ("kappa", "feature_norm")]
    return table(["quality", "images", "5 %", "median", "95 %", "Spearman with severity"], rows)


def _reject_table(results: dict) -> str:
    reject = results["reject"]
    rows = [[label, f"{results['reject_area'][order]:.5f}", *(_fraction(error) for error in reject["error"][order])] for order, label in _ORDERS.items()]
    about = (f"Pairs of the {reject['set']} set, those whose lower image quality is least rejected first; accepted above cosine "
             f"{reject['threshold']:.4f}, the equal error rate on all of them, throughout.")
    return table(["rejected by", "area", *(f"error at {fraction:.0%}" for fraction in REJECTED)], rows) + "\n\n" + about


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def check_folder(out: Path, model: str, data: str, overwrite: bool) -> None:
    """Refuses a folder that holds the report of another model or data set, before any work is done.

    Raises:
        ValueError: so it is, or its results.json cannot be read, and overwrite is False; or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} must be a folder, and is a file; give another --out")
    path = out / RESULTS_FILE
    if overwrite or not path.exists():
        return
    try:
        earlier = json.loads(path.read_text())
        earlier = earlier["model"], earlier["data"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is no evaluation result; give another --out, or --overwrite") from None
    if earlier != (model, data):
        raise ValueError(f"{out} holds the evaluation of model {earlier[0]} on {earlier[1]}; give another --out, or --overwrite")


def prepare_folder(out: Path) -> None:
    """Makes the folder, and takes the figures of an earlier report out of it: the new one may have fewer."""
    out.mkdir(parents=True, exist_ok=True)
    for name in _FIGURES:
        (out / name).unlink(missing_ok=True)


def write_report(out: Path, results: dict) -> None:
    """Writes report.md, with those figures that lie in `out`, and then results.json; both replace what is there."""
    figures = [f"![{title}]({name})" for name, title in _FIGURES.items() if (out / name).exists()]
    text = f"# Evaluation of {results['model']} on {results['data']}\n\n{tables(results)}\n\n" + "\n\n".join(figures) + "\n"
    for name, content in (REPORT_FILE, text), (RESULTS_FILE, json.dumps(results, indent=2, allow_nan=False) + "\n"):
        with atomic_output(out / name) as file:
            file.write(content.encode())
