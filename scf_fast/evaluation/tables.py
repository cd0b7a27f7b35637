"""Tables of the results of one or several models, side by side."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from scf_fast.evaluation.results import (
    DENSITY_MEASURES,
    MATCHERS,
    REJECTED_FRACTIONS,
    BySet,
    IdentificationResult,
    Matcher,
    Quality,
    QualityResult,
    Rates,
    RejectionResult,
    Results,
    Score,
    SectionT,
    TemplateResult,
    Weighting,
)
from scf_fast.objectives import Density
from scf_fast.pipelines.text import as_latex, as_markdown, printable

_PUBLISHED_FARS = ("1e-05", "1e-04")  # of the table in the paper's repository
Models = dict[str, Results]  # by the name of the model
Rows = list[list[str]]
T = TypeVar("T")
_TEXT_WIDTH = 100  # of what stands under a table in plain text
_POOLING = {Density.VMF: "Eqn (14)", Density.GAUSSIAN: "PFE's fusion"}


@dataclass(frozen=True)
class Table:
    """A section of the report."""

    title: str
    header: list[str]
    rows: Rows
    about: str = ""  # a sentence under the table
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells that stand out

    def word_columns(self) -> list[bool]:
        """Tells columns of words, which are aligned left, from columns of numbers, which are aligned right."""
        return [not all(cell[:1] in "–-0123456789" for cell in column) for column in zip(*self.rows)]

    def _marked(self, write: Callable[[str], str], mark: Callable[[str], str], plain: str = "") -> Rows:
        """Returns header and rows in a form of text, the best cells marked.

        Args:
            write: escapes a cell.
            mark: marks what it returns.
            plain: follows the cells that are not the best.
        """
        rows = [
            [mark(write(cell)) if (i, j) in self.best else write(cell) + plain for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        return [[write(cell) for cell in self.header], *rows]

    def _aligned(self, rows: Rows) -> Rows:
        """Returns header and rows, with a line under the header, padded to the same width in each column."""
        words, widths = self.word_columns(), [max(map(len, column)) for column in zip(*rows)]
        lines = [
            [cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(row, widths, words)]
            for row in rows
        ]
        rule = ["-" * width if word else "-" * (width - 1) + ":" for width, word in zip(widths, words)]
        return [lines[0], rule, *lines[1:]]

    def markdown(self) -> str:
        """Returns the table as Markdown, its columns padded so that it also reads well as plain text."""
        lines = self._aligned(self._marked(as_markdown, lambda cell: f"**{cell}**"))
        text = f"## {as_markdown(self.title)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{text}\n\n{as_markdown(self.about, begins_block=True)}" if self.about else text

    def text(self) -> str:
        """Returns the table as plain text; a star follows the best cells."""
        rows = self._marked(printable, lambda cell: f"{cell}*", " " if self.best else "")
        lines = self._aligned([[row[0].rstrip(), *row[1:]] for row in rows])
        lines[1] = ["-" * len(cell) for cell in lines[0]]
        about = ["", *textwrap.wrap(printable(self.about), _TEXT_WIDTH)] if self.about else []
        return "\n".join([printable(self.title), "", *("  ".join(line).rstrip() for line in lines), *about])

    def latex(self) -> str:
        """Returns the table as a LaTeX tabular that needs no package; the best cells are bold."""

        columns = "".join("l" if word else "r" for word in self.word_columns())
        rows = self._marked(as_latex, lambda cell: rf"\textbf{{{cell}}}")
        lines = [" & ".join(row) + r" \\" for row in rows]
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
        return "\n".join([f"% {printable(self.title)}", *body, r"\end{tabular}"])


def make_tables(models: Models) -> list[Table]:
    """Returns a table for every section that some model's results have."""
    several = list(models.values())
    tables: list[Table] = []
    if any(results.verification for results in several):
        tables.append(_verification_table(models))
    if any(results.templates for results in several):
        tables += _template_tables(models)
    if any(results.identification for results in several):
        tables += _identification_tables(models)
    if any(results.rejection or results.template_quality for results in several):
        tables += _quality_tables(models)
    if any(results.rejection for results in several):
        tables.append(_rejection_table(models))
    return tables


def tables_as_text(tables: list[Table], notes: list[str]) -> str:
    """Returns all tables and notes as Markdown that is fit for a terminal."""
    parts = [table.markdown() for table in tables]
    if notes:
        parts.append("\n".join(f"* {as_markdown(note, begins_block=True)}" for note in notes))
    return "\n\n".join(parts)


def _with_model_column(models: Models, header: list[str], rows: dict[str, Rows]) -> tuple[list[str], Rows]:
    """Returns header and rows, with the model's name in front where there are several models.

    Args:
        rows: by the name of the model; some models may have none.
    """
    if len(models) == 1:
        return header, next(iter(rows.values()))
    return ["model", *header], [[name, *row] for name in models for row in rows.get(name, [])]


def _sets_of(models: Models, section: Callable[[Results], BySet[SectionT] | None]) -> dict[str, dict[str, SectionT]]:
    """Returns a section's results by model and data set, for the models that have it."""
    found = {name: section(results) for name, results in models.items()}
    return {name: by_set.in_order() for name, by_set in found.items() if by_set is not None}


def _by_set(sections: dict[str, dict[str, T]]) -> dict[str, dict[str, T]]:
    """Regroups results by model and data set to results by data set and model."""
    names = dict.fromkeys(name for sets in sections.values() for name in sets)
    return {name: {model: sets[name] for model, sets in sections.items() if name in sets} for name in names}


def _occurring_rates(tables: list[Rates]) -> list[str]:
    """Returns all rates that occur, falling."""
    return sorted({rate for table in tables for rate in table}, key=float, reverse=True)


def _fraction(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _matcher_cells(matcher: Matcher) -> list[str]:
    return [matcher.weighting.label, matcher.score.label]


def _verification_table(models: Models) -> Table:
    sections = _sets_of(models, lambda results: results.verification)
    # Every score has the same rates: they depend on the number of impostor pairs.
    cosines = [result.by_score[Score.COSINE] for sets in sections.values() for result in sets.values()]
    fars = _occurring_rates([measures.tar_at_far for measures in cosines])
    rows: dict[str, Rows] = {
        name: [
            [
                set_name,
                score.label,
                str(result.pairs),
                f"{measures.accuracy:.4f} ± {measures.accuracy_std:.4f}",
                f"{measures.equal_error_rate:.4f}",
                f"{measures.area_under_roc:.4f}",
                *(_fraction(measures.tar_at_far.get(far)) for far in fars),
            ]
            for set_name, result in sets.items()
            for score, measures in result.by_score.items()
        ]
        for name, sets in sections.items()
    }
    header = ["set", "score", "pairs", "10-fold accuracy", "EER", "AUC", *(f"TAR @ FAR {far}" for far in fars)]
    return Table("Verification", *_with_model_column(models, header, rows))


def _template_tables(models: Models) -> list[Table]:
    sections = _sets_of(models, lambda results: results.templates)
    by_protocol = _by_set(sections)
    tables = [_template_table(models, protocol, found) for protocol, found in by_protocol.items()]
    return tables + _published_tables(models, sections, list(by_protocol))


def _template_table(models: Models, protocol: str, found: dict[str, TemplateResult]) -> Table:
    fars = _occurring_rates([rates for result in found.values() for rates in result.tar_at_far.values()])
    rows: dict[str, Rows] = {
        name: [
            [*_matcher_cells(matcher), *(_fraction(result.tar_at_far[matcher].get(far)) for far in fars)]
            for matcher in MATCHERS
            if matcher in result.tar_at_far
        ]
        for name, result in found.items()
    }
    counts = next(iter(found.values()))
    return Table(
        f"Templates: {protocol}, 1:1",
        *_with_model_column(models, ["pooling", "score", *(f"TAR @ FAR {far}" for far in fars)], rows),
        f"{counts.images} images in {counts.templates} templates; {counts.genuine_pairs} genuine and "
        f"{counts.impostor_pairs} impostor comparisons. The images of one medium are averaged first, with the same "
        "weights, except in the rows that say every image.",
    )


def _published_tables(
    models: Models, sections: dict[str, dict[str, TemplateResult]], protocols: list[str]
) -> list[Table]:
    """Compares average pooling with that by confidence in the layout of the paper's repository: one column for each
    protocol and false accept rate, in percent; no table where none of its rates was measured.

    Args:
        models, sections: all models, and the results of those that have templates.
    """
    average = Matcher(Weighting.AVERAGE, Score.COSINE)
    columns = [
        (protocol, far)
        for protocol in protocols
        for far in _PUBLISHED_FARS
        if any(far in sets[protocol].tar_at_far[average] for sets in sections.values() if protocol in sets)
    ]
    if not columns:
        return []
    rows = []
    described = []
    for name, sets in sections.items():
        objective = models[name].objective
        measures, addition = DENSITY_MEASURES[objective.density], f"+ {objective.title}"
        with_score = f"{addition}, {measures.score.label}"
        for label, matcher in ((name, average), (addition, measures.pooled), (with_score, measures.likelihood)):
            if any(matcher in result.tar_at_far for result in sets.values()):
                rates = {protocol: result.tar_at_far.get(matcher, {}) for protocol, result in sets.items()}
                cells = [_percent(rates.get(protocol, {}).get(far)) for protocol, far in columns]
                rows.append([label, *cells])
        described.append(
            f"{addition}: of media averaged with {measures.quality.label} as weight, {_POOLING[objective.density]}; "
            f"{measures.score.label} takes {measures.quality.label} summed over every image"
        )
    return [
        Table(
            "Templates as in the published table",
            ["TAR [%]", *(f"{protocol} {float(far):.0e}" for protocol, far in columns)],
            rows,
            f"The cosine of averaged media; {'; '.join(dict.fromkeys(described))}.",
        )
    ]


def _identification_tables(models: Models) -> list[Table]:
    by_protocol = _by_set(_sets_of(models, lambda results: results.identification))
    return [_identification_table(models, protocol, found) for protocol, found in by_protocol.items()]


def _identification_table(models: Models, protocol: str, found: dict[str, IdentificationResult]) -> Table:
    searches = [result for identification in found.values() for result in identification.by_matcher.values()]
    ranks, fpirs = list(searches[0].rank), _occurring_rates([result.tpir_at_fpir for result in searches])
    rows: dict[str, Rows] = {
        name: [
            [
                *_matcher_cells(matcher),
                *(_fraction(identification.by_matcher[matcher].rank[rank]) for rank in ranks),
                *(_fraction(identification.by_matcher[matcher].tpir_at_fpir.get(fpir)) for fpir in fpirs),
            ]
            for matcher in MATCHERS
            if matcher in identification.by_matcher
        ]
        for name, identification in found.items()
    }
    counts = next(iter(found.values()))
    about = f"{counts.searches} searches of {counts.enrolled} subjects."
    if len(counts.galleries) > 1:
        about += (
            f" Ranks in the galleries {', '.join(counts.galleries)} together; TPIR as the mean over them one by one."
        )
    rates = [*(f"rank {rank}" for rank in ranks), *(f"TPIR @ FPIR {fpir}" for fpir in fpirs)]
    return Table(
        f"Identification: {protocol}, 1:N", *_with_model_column(models, ["pooling", "score", *rates], rows), about
    )


def _quality_by_set(results: Results) -> dict[str, QualityResult]:
    images: dict[str, QualityResult] = {}
    if results.rejection is not None:
        images[results.rejection.name] = results.rejection.images
    if results.template_quality is not None:
        images |= results.template_quality.in_order()
    return images


def _quality_tables(models: Models) -> list[Table]:
    rows: dict[str, Rows] = {}
    for name, results in models.items():
        rows[name] = [
            [
                measure.label,
                set_name,
                *(f"{value:.4g}" for value in (quantiles.p05, quantiles.median, quantiles.p95)),
                _fraction(quantiles.severity_spearman),
            ]
            for set_name, result in _quality_by_set(results).items()
            for measure, quantiles in result.measures.items()
        ]
    header = ["quality", "images of", "5 %", "median", "95 %", "Spearman with severity"]
    return [Table("Quality", *_with_model_column(models, header, rows)), *_reliability_tables(models)]


def _reliability_tables(models: Models) -> list[Table]:
    """Says for each set whether kappa means what it says; no table where none has a kappa."""
    rows: dict[str, Rows] = {}
    for name, results in models.items():
        for set_name, result in _quality_by_set(results).items():
            if result.reliability is not None:
                cells = [_fraction(result.reliability.error), f"{result.reliability.factor:.4g}"]
                rows.setdefault(name, []).append([set_name, *cells])
    if not rows:
        return []
    header = ["images of", "mean difference", "κ fits times"]
    about = (
        "The cosine of an image with the center of its person, estimated from the person's other images, against the "
        "one that κ predicts: mean difference over the deciles of κ, and the one factor on κ that fits these people, "
        "which python -m scf_fast.calibrate stores with the model."
    )
    return [Table("Reliability of κ", *_with_model_column(models, header, rows), about)]


def _rejection_table(models: Models) -> Table:
    found: dict[str, RejectionResult] = {
        name: results.rejection for name, results in models.items() if results.rejection is not None
    }

    def row(result: RejectionResult, order: Quality) -> list[str]:
        return [order.label, f"{result.areas[order]:.5f}", *map(_fraction, result.errors[order])]

    rows = {name: [row(result, order) for order in result.errors] for name, result in found.items()}
    one = next(iter(found.values()))
    operating_point = "the equal error rate" if one.far is None else f"FAR {one.far:g}"
    thresholds: dict[Score, list[str]] = {}
    for result in found.values():
        thresholds.setdefault(result.score, []).append(f"{result.threshold:.4f}")
    accepted = ", ".join(f"{score.label} {', '.join(values)}" for score, values in thresholds.items())
    return Table(
        "Error versus reject",
        *_with_model_column(
            models, ["rejected by", "area", *(f"error at {fraction:.0%}" for fraction in REJECTED_FRACTIONS)], rows
        ),
        f"Pairs of {one.name}, those whose lower quality is least rejected first; accepted above {accepted}, "
        f"{operating_point} on all of them, throughout.",
    )
