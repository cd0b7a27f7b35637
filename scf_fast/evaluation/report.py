"""The results of one or several models as tables, and the report folder: results.json, report.md with its figures,
report.html on its own.
"""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path

from scf_fast.errors import InputError
from scf_fast.pipelines.formats.atomic_file import atomic_output

RESULTS_FILE, MARKDOWN_FILE, HTML_FILE = "results.json", "report.md", "report.html"
REJECTED = (0.0, 0.1, 0.2, 0.5)  # fractions shown in the table of error-versus-reject

ROC, DET, TEMPLATES, SCORES, REJECT, SEVERITY, HISTOGRAM, FACES, PAIRS = (
    f"{figure}.png"
    for figure in ("roc", "det", "templates", "scores", "reject", "severity", "kappa_histogram", "faces", "pairs")
)
_FIGURES = {
    ROC: "Verification ROC",
    DET: "Detection error trade-off",
    TEMPLATES: "Template verification ROC",
    SCORES: "Scores of all comparisons",
    REJECT: "Error versus reject",
    SEVERITY: "κ against known severity",
    HISTOGRAM: "κ of genuine and impostor pairs",
    FACES: "Faces by κ",
    PAIRS: "Best and worst pairs",
}
_WIDE = (FACES, PAIRS)
COSINE, VMF = "cosine", "Eqn (13)"
POOLINGS = {
    "average": "average",
    "norm": "norm-weighted",
    "detector": "detector-weighted",
    "norm_detector": "norm × detector",
    "kappa": "κ, Eqn (14)",
    "kappa_images": "κ, Eqn (14), every image",
}
_SCORED = {
    key + suffix: (pooling, score)
    for key, pooling in POOLINGS.items()
    for suffix, score in (("", COSINE), ("_vmf", VMF))
}
_ORDERS = {
    "kappa": "κ",
    "feature_norm": "feature norm",
    "detector": "detector score",
    "random": "random",
    "oracle": "oracle",
}
_PUBLISHED = ("1e-05", "1e-04")  # false accept rates of the table in the paper's repository


def numbered(figure: str, number: int) -> str:
    """The file name of a figure that there may be several of."""
    return figure if number == 0 else f"{Path(figure).stem}-{number + 1}.png"


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    about: str = ""

    def _words(self) -> list[bool]:
        """Which columns hold words, and belong left; numbers belong right."""
        return [not all(cell[0] in "–-0123456789" for cell in column) for column in zip(*self.rows)]

    def markdown(self) -> str:
        """With aligned columns, so that it also reads well as plain text."""
        words, widths = self._words(), [max(map(len, column)) for column in zip(self.header, *self.rows)]
        lines = [
            [cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(row, widths, words)]
            for row in (self.header, *self.rows)
        ]
        lines.insert(1, ["-" * width if word else "-" * (width - 1) + ":" for width, word in zip(widths, words)])
        text = f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\n{self.about}" if self.about else text

    def html(self) -> str:
        words = self._words()
        head, *body = (
            "".join(f"<{tag}{' class=word' * word}>{html.escape(cell)}</{tag}>" for cell, word in zip(row, words))
            for row, tag in [(self.header, "th"), *((row, "td") for row in self.rows)]
        )
        body = "".join(f"<tr>{row}</tr>" for row in body)
        about = f"<p class=about>{html.escape(self.about)}</p>" if self.about else ""
        return (
            f"<section><h2>{html.escape(self.title)}</h2><div "
            f"class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"{about}</section>"
        )


def tables(models: dict[str, dict]) -> list[Table]:
    """Every section of the results that is there, the models side by side.

    Args:
        models: results by the name of the model.
    """
    makers = {
        "verification": _verification,
        "templates": _templates,
        "identification": _identification,
        "feature_norm": _quality,
        "template_quality": _quality,
        "reject": _rejection,
    }
    found = dict.fromkeys(maker for key, maker in makers.items() if any(key in results for results in models.values()))
    return [table for maker in found for table in maker(models)]


def _sets(section: dict, kind: str) -> dict[str, dict]:
    """All data sets of a section by name."""
    return {section[kind]: section} | section["others"]


def _named(
    models: dict[str, dict], header: list[str], rows: dict[str, list[list[str]]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows with the model's name in front where there are several."""
    if len(models) == 1:
        return header, next(iter(rows.values()))
    return ["model", *header], [[name, *row] for name in models for row in rows.get(name, [])]


def _rates(tables_by_rate: list[dict[str, float]]) -> list[str]:
    """All rates that occur, falling."""
    return sorted({rate for table in tables_by_rate for rate in table}, key=float, reverse=True)


def _verification(models: dict[str, dict]) -> list[Table]:
    sections = {
        name: _sets(results["verification"], "set") for name, results in models.items() if "verification" in results
    }
    fars = _rates([summary["tar_at_far"] for sets in sections.values() for summary in sets.values()])
    rows = {name: [] for name in sections}
    for name, sets in sections.items():
        for key, summary in sets.items():
            for score, suffix in (COSINE, ""), (VMF, "_vmf"):
                if f"accuracy{suffix}" not in summary:
                    continue
                accuracy = f"{summary[f'accuracy{suffix}']:.4f} ± {summary[f'accuracy{suffix}_std']:.4f}"
                rows[name].append(
                    [
                        key,
                        score,
                        str(summary["pairs"]),
                        accuracy,
                        f"{summary[f'eer{suffix}']:.4f}",
                        f"{summary[f'auc{suffix}']:.4f}",
                        *(_fraction(summary[f"tar_at_far{suffix}"].get(far)) for far in fars),
                    ]
                )
    header = ["set", "score", "pairs", "10-fold accuracy", "EER", "AUC", *(f"TAR @ FAR {far}" for far in fars)]
    return [Table("Verification", *_named(models, header, rows))]


def _templates(models: dict[str, dict]) -> list[Table]:
    sections = {
        name: _sets(results["templates"], "protocol") for name, results in models.items() if "templates" in results
    }
    protocols = list(dict.fromkeys(protocol for section in sections.values() for protocol in section))
    result = []
    for protocol in protocols:
        found = {name: section[protocol] for name, section in sections.items() if protocol in section}
        fars = _rates([summary[key] for summary in found.values() for key in _SCORED if key in summary])
        rows = {
            name: [
                [*_SCORED[key], *(_fraction(summary[key].get(far)) for far in fars)]
                for key in _SCORED
                if key in summary
            ]
            for name, summary in found.items()
        }
        counts = next(iter(found.values()))
        result.append(
            Table(
                f"Templates: {protocol}, 1:1",
                *_named(models, ["pooling", "score", *(f"TAR @ FAR {far}" for far in fars)], rows),
                f"{counts['images']} images in {counts['templates']} templates; {counts['genuine_pairs']} genuine and "
                f"{counts['impostor_pairs']} impostor "
                "comparisons. The images of one medium are averaged first, with the same weights, but for every image "
                "alike.",
            )
        )
    return result + _published(sections, protocols)


def _published(sections: dict[str, dict[str, dict]], protocols: list[str]) -> list[Table]:
    """Average pooling against SCF's in the layout of the paper's repository: a column a protocol and false accept rate,
    in percent.
    """
    columns = [
        (protocol, far)
        for protocol in protocols
        for far in _PUBLISHED
        if any(far in section[protocol]["average"] for section in sections.values() if protocol in section)
    ]
    if not columns:
        return []
    rows = [
        [
            label,
            *(
                "–" if key not in section.get(protocol, {}) else _percent(section[protocol][key].get(far))
                for protocol, far in columns
            ),
        ]
        for name, section in sections.items()
        for label, key in ((name, "average"), ("+ SCF", "kappa"), ("+ SCF, Eqn (13)", "kappa_images_vmf"))
        if any(key in summary for summary in section.values())
    ]
    return [
        Table(
            "Templates as in the published table",
            ["TAR [%]", *(f"{protocol} {float(far):.0e}" for protocol, far in columns)],
            rows,
            "The cosine of averaged media; + SCF: of media averaged with κ as weight, Eqn (14); Eqn (13) takes κ "
            "summed over every image.",
        )
    ]


def _identification(models: dict[str, dict]) -> list[Table]:
    sections = {
        name: _sets(results["identification"], "protocol")
        for name, results in models.items()
        if "identification" in results
    }
    result = []
    for protocol in dict.fromkeys(protocol for section in sections.values() for protocol in section):
        found = {name: section[protocol] for name, section in sections.items() if protocol in section}
        summaries = [summary[key] for summary in found.values() for key in _SCORED if key in summary]
        ranks, fpirs = list(summaries[0]["rank"]), _rates([summary["tpir_at_fpir"] for summary in summaries])
        rows = {
            name: [
                [
                    *_SCORED[key],
                    *(_fraction(summary[key]["rank"][rank]) for rank in ranks),
                    *(_fraction(summary[key]["tpir_at_fpir"].get(fpir)) for fpir in fpirs),
                ]
                for key in _SCORED
                if key in summary
            ]
            for name, summary in found.items()
        }
        counts = next(iter(found.values()))
        several = len(counts["galleries"]) > 1
        result.append(
            Table(
                f"Identification: {protocol}, 1:N",
                *_named(
                    models,
                    [
                        "pooling",
                        "score",
                        *(f"rank {rank}" for rank in ranks),
                        *(f"TPIR @ FPIR {fpir}" for fpir in fpirs),
                    ],
                    rows,
                ),
                f"{counts['searches']} searches of {counts['enrolled']} subjects."
                + (
                    f" Ranks in the galleries {', '.join(counts['galleries'])} together; TPIR as the mean over them "
                    "one by one."
                    if several
                    else ""
                ),
            )
        )
    return result


def _quality(models: dict[str, dict]) -> list[Table]:
    rows = {}
    for name, results in models.items():
        images = {results["reject"]["set"]: results} if "reject" in results else {}
        if "template_quality" in results:
            images |= _sets(results["template_quality"], "protocol")
        rows[name] = [
            [
                _ORDERS[key],
                label,
                *(f"{quality[key][level]:.4g}" for level in ("p05", "median", "p95")),
                _fraction(quality[key]["severity_spearman"]),
            ]
            for label, quality in images.items()
            for key in ("kappa", "feature_norm")
            if key in quality
        ]
    return [
        Table(
            "Quality",
            *_named(models, ["quality", "images of", "5 %", "median", "95 %", "Spearman with severity"], rows),
        )
    ]


def _rejection(models: dict[str, dict]) -> list[Table]:
    found = {name: results for name, results in models.items() if "reject" in results}
    rows = {
        name: [
            [_ORDERS[order], f"{results['reject_area'][order]:.5f}", *(_fraction(error) for error in errors)]
            for order, errors in results["reject"]["error"].items()
        ]
        for name, results in found.items()
    }
    one = next(iter(found.values()))["reject"]
    where = "the equal error rate" if one["far"] is None else f"FAR {one['far']:g}"
    thresholds = ", ".join(f"{results['reject']['threshold']:.4f}" for results in found.values())
    return [
        Table(
            "Error versus reject",
            *_named(models, ["rejected by", "area", *(f"error at {fraction:.0%}" for fraction in REJECTED)], rows),
            f"Pairs of {one['set']}, those whose lower quality is least rejected first; accepted above {one['score']} "
            f"{thresholds}, {where} on all of "
            "them, throughout.",
        )
    ]


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def text(models: dict[str, dict], notes: list[str]) -> str:
    """All tables and notes as Markdown that is fit for a terminal."""
    return "\n\n".join(
        [
            *(table.markdown() for table in tables(models)),
            *(["\n".join(f"* {note}" for note in notes)] if notes else []),
        ]
    )


def check_folder(out: Path, request: dict, overwrite: bool) -> None:
    """Refuses a folder that holds the report of another evaluation, before any work is done.

    Args:
        request: what is asked for, fit for JSON.
    Raises:
        ValueError: so it is, or its results.json cannot be read, and overwrite is False; or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} must be a folder, and is a file; give another --out")
    path = out / RESULTS_FILE
    if overwrite or not path.exists():
        return
    try:
        earlier = json.loads(path.read_text())["request"]
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{path} is no evaluation result; give another --out, or --overwrite") from None
    if earlier != request:
        different = ", ".join(
            f"{key} {earlier.get(key)} -> {value}" for key, value in request.items() if earlier.get(key) != value
        )
        raise InputError(f"{out} holds another evaluation ({different}); give another --out, or --overwrite")


def write_report(
    out: Path,
    request: dict,
    models: dict[str, dict],
    figures: dict[str, dict[str, bytes]],
    notes: list[str],
    files: dict[str, str] | None = None,
) -> None:
    """Writes the report folder; results.json comes last. The figures of an earlier report are removed.

    Args:
        out: made if missing.
        request: what was asked for, fit for JSON.
        models: results by the name of the model. results.json holds those of a single model at its top, those of
            several under "models".
        figures: PNG by the name of the model and of the file.
        notes: what was left out and why.
        files: text by the name of a file to put beside.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"):
        if any(
            old.stem.removeprefix(f"model{number}-").startswith(Path(figure).stem)
            for figure in _FIGURES
            for number in range(1, 100)
        ):
            old.unlink()
    prefixes = {name: "" if len(models) == 1 else f"model{number}-" for number, name in enumerate(models, 1)}
    for name, pictures in figures.items():
        for file_name, png in pictures.items():
            with atomic_output(out / (prefixes[name] + file_name)) as file:
                file.write(png)
    single = next(iter(models.values())) if len(models) == 1 else None
    results = {"request": request, "notes": notes} | (single if single is not None else {"models": models})
    title = f"Evaluation of {', '.join(models)}"
    links = [
        f"![{_title(file_name)}{'' if single is not None else f', {name}'}]({prefixes[name] + file_name})"
        for name, pictures in figures.items()
        for file_name in pictures
    ]
    markdown = "\n\n".join([f"# {title}", text(models, notes), *links]) + "\n"
    contents = (files or {}) | {
        MARKDOWN_FILE: markdown,
        HTML_FILE: _page(title, request, models, figures, notes),
        RESULTS_FILE: json.dumps(results, indent=2, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        with atomic_output(out / name) as file:
            file.write(content.encode())


def _title(file_name: str) -> str:
    stem = Path(file_name).stem
    return next(title for figure, title in _FIGURES.items() if stem.split("-")[0] == Path(figure).stem)


_STYLE = """
:root { --ink: #1d2430; --quiet: #667080; --line: #dfe3ea; --back: #f5f6f8; --card: #ffffff; --accent: #2f6db3; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 0 0 12px; }
section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 18px 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 10px 0 0; color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 14px; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; } .word { text-align: left; } th:first-child, td:first-child { padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; } tbody tr:hover { background: var(--back); }
.about, .notes { color: var(--quiet); font-size: 13px; margin: 12px 0 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 18px; margin-top: 18px; }
.figures figure { margin: 0; padding: 12px; } .figures .wide { grid-column: 1 / -1; }
figcaption { color: var(--quiet); font-size: 13px; } img { width: 100%; height: auto; display: block; }
@media (max-width: 520px) { .figures { grid-template-columns: 1fr; } }
"""


def _page(
    title: str, request: dict, models: dict[str, dict], figures: dict[str, dict[str, bytes]], notes: list[str]
) -> str:
    """A page that needs nothing but itself: style and pictures are in it."""
    facts = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(', '.join(value) if isinstance(value, list) else str(value))}</dd>"
        for key, value in request.items()
    )
    sections = "".join(table.html() for table in tables(models))
    notes_list = f"<ul class=notes>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>" if notes else ""
    # The same figure of every model stands in one row.
    order = sorted({file_name for pictures in figures.values() for file_name in pictures}, key=_position)
    pictures = "".join(
        _figure(file_name, figures[name][file_name], "" if len(models) == 1 else name)
        for file_name in order
        for name in figures
        if file_name in figures[name]
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, "
        "initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><main><h1>{html.escape(title)}</h1><dl>{facts}</dl>"
        f"{sections}{notes_list}<div class=figures>{pictures}</div></main></html>\n"
    )


def _position(file_name: str) -> tuple[int, str]:
    stems = [Path(figure).stem for figure in _FIGURES]
    return stems.index(Path(file_name).stem.split("-")[0]), file_name


def _figure(file_name: str, png: bytes, model: str) -> str:
    kind = " class=wide" if file_name in _WIDE else ""
    caption = f"<figcaption>{html.escape(model)}</figcaption>" if model else ""
    data = base64.b64encode(png).decode()
    return f"<figure{kind}><img alt='{html.escape(_title(file_name))}' src='data:image/png;base64,{data}'>{caption}</figure>"
