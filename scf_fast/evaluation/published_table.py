"""The published table: each backbone alone and under each objective of stage 2, from results that are there already.

Nothing is computed here. :mod:`scf_fast.evaluation.systems` measures.
"""

import enum
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from scf_fast.errors import InputError
from scf_fast.evaluation.results import (
    DENSITY_MEASURES,
    Matcher,
    Quality,
    RejectionResult,
    Results,
    Score,
    TemplateResult,
    Weighting,
)
from scf_fast.evaluation.tables import Table
from scf_fast.objectives import Objective

System = Objective | None  # a row: what the confidence net is trained for; None is the backbone alone
Block = dict[System, list[Results]]  # the rows of a backbone that there are, with the results of each data folder
Blocks = dict[str, Block]  # by the name of the backbone

SYSTEMS: tuple[System, ...] = (None, Objective.PFE, Objective.PFE_VMF, Objective.SCF_GAUSSIAN, Objective.SCF)
_PUBLISHED_FARS = ("1e-05", "1e-04")
_FARS_OF_SMALL_SETS = 3
_AVERAGE = Matcher(Weighting.AVERAGE, Score.COSINE)
# TAR in percent with ResNet100, by column. Source: README of the paper's repository, "Empirical Results" (Li et al.,
# CVPR 2021). It has no PFE-v: "N/A".
_PUBLISHED_COLUMNS = tuple((name, far) for name in ("IJB-B", "IJB-C") for far in _PUBLISHED_FARS)
_PUBLISHED: dict[str, dict[System, tuple[float, ...]]] = {
    "cosface": {
        None: (89.81, 94.59, 93.86, 95.95),
        Objective.PFE: (89.96, 94.64, 94.09, 96.04),
        Objective.SCF_GAUSSIAN: (89.97, 94.56, 94.15, 96.02),
        Objective.SCF: (91.02, 94.95, 94.78, 96.22),
    },
    "arcface": {
        None: (89.33, 94.20, 93.15, 95.60),
        Objective.PFE: (89.55, 94.30, 92.95, 95.32),
        Objective.SCF_GAUSSIAN: (89.52, 94.24, 93.85, 95.33),
        Objective.SCF: (90.68, 94.74, 94.04, 96.09),
    },
}


class TableFormat(enum.Enum):
    """A form of the tables; the value is what ``--format`` calls it."""

    TEXT = "text"
    MARKDOWN = "markdown"
    LATEX = "latex"
    JSON = "json"

    @property
    def file_name(self) -> str:
        """Name in the report folder."""
        return {"text": "table.txt", "markdown": "table.md", "latex": "table.tex", "json": "table.json"}[self.value]


@dataclass(frozen=True)
class Column:
    """A column: a number of every row that has it."""

    title: str
    values: dict[tuple[str, System], float]  # by the name of the backbone and the system
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None = max  # None: nothing is best in it


@dataclass(frozen=True)
class SystemTable:
    """A table with the rows of the published one: for each backbone itself and the four systems."""

    key: str  # in results.json
    title: str
    corner: str  # head of the first column
    backbones: list[str]
    columns: list[Column]
    about: str

    def rows(self) -> list[tuple[str, System]]:
        """Returns what the rows are of."""
        return [(backbone, system) for backbone in self.backbones for system in SYSTEMS]

    def is_best(self, column: Column, row: tuple[str, System]) -> bool:
        """Returns whether a row is the best of its backbone in a column, as shown; where only one has a number none
        is.
        """
        values = [value for (backbone, _), value in column.values.items() if backbone == row[0]]
        if column.best is None or len(values) < 2 or row not in column.values:
            return False
        return column.show(column.values[row]) == column.show(column.best(values))

    def as_table(self) -> Table:
        """Returns the table as the report shows it; what is not there is a dash."""
        rows = [
            [backbone if system is None else f"+ {system.title}"]
            + [
                column.show(column.values[backbone, system]) if (backbone, system) in column.values else "–"
                for column in self.columns
            ]
            for backbone, system in self.rows()
        ]
        best = {
            (i, 1 + j)
            for i, row in enumerate(self.rows())
            for j, column in enumerate(self.columns)
            if self.is_best(column, row)
        }
        header = [self.corner, *(column.title for column in self.columns)]
        return Table(self.title, header, rows, self.about, frozenset(best))

    def as_json(self) -> dict[str, Any]:
        """Returns the table as results.json and table.json have it: numbers unrounded, None where there is none."""
        return {
            "title": self.title,
            "columns": [column.title for column in self.columns],
            "rows": [
                {
                    "backbone": row[0],
                    "system": None if row[1] is None else row[1].title,
                    "objective": None if row[1] is None else row[1].value,
                    "values": [column.values.get(row) for column in self.columns],
                    "best": [self.is_best(column, row) for column in self.columns],
                }
                for row in self.rows()
            ],
        }


def make_system_tables(blocks: Blocks, with_published: bool = False) -> list[SystemTable]:
    """Returns the published table of these results, and those beside it that they allow.

    Args:
        blocks: of at least one backbone.
        with_published: show the paper's own numbers beside ours.
    Raises:
        InputError: the paper's numbers are asked for, and no backbone has the name of one of the paper's.
    """
    tables = [
        _template_table(
            blocks,
            "templates",
            "The published table: templates",
            _pooled,
            "By cosine. The backbone averages media; + SYSTEM weights them by its confidence, κ (Eqn 14) or 1/σ². What "
            "stands out is the best of a backbone's rows.",
        ),
        _template_table(
            blocks,
            "templates_likelihood",
            "Templates by the likelihood of each system",
            _likelihood,
            "The backbone by cosine, as above; + SYSTEM weights every image by its confidence and scores by Eqn (13) "
            "or the mutual likelihood score.",
        ),
        _verification_table(blocks),
        _risk_table(blocks),
    ]
    if with_published:
        tables[0] = _with_published(tables[0])
    return [table for table in tables if table.columns]


def system_tables_as_json(tables: list[SystemTable]) -> dict[str, Any]:
    """Returns all tables by their keys."""
    return {table.key: table.as_json() for table in tables}


def render(tables: list[SystemTable], table_format: TableFormat) -> str:
    """Returns all tables in one form."""
    if table_format is TableFormat.JSON:
        return json.dumps(system_tables_as_json(tables), indent=2)
    write = {
        TableFormat.TEXT: Table.text,
        TableFormat.MARKDOWN: Table.markdown,
        TableFormat.LATEX: Table.latex,
    }[table_format]
    return "\n\n".join(write(table.as_table()) for table in tables)


def check_published(backbones: list[str]) -> dict[str, dict[System, tuple[float, ...]]]:
    """Returns the paper's numbers by the names of those backbones that it has.

    Raises:
        InputError: it has none of them.
    """
    known = {name: _PUBLISHED[name.lower()] for name in backbones if name.lower() in _PUBLISHED}
    if not known:
        raise InputError(
            f"--with-published: the paper has the backbones {' and '.join(_PUBLISHED)}, and --backbone "
            f"{', '.join(backbones)}; name one so, as in --backbone arcface=DIR"
        )
    return known


def _pooled(system: System) -> Matcher:
    """Returns how the published table compares templates: by cosine, media weighted by the system's confidence."""
    return _AVERAGE if system is None else DENSITY_MEASURES[system.density].pooled


def _likelihood(system: System) -> Matcher:
    """Returns how a system compares templates by its own likelihood, which needs every image."""
    return _AVERAGE if system is None else DENSITY_MEASURES[system.density].likelihood


def _score(system: System) -> Score:
    """Returns the similarity of two images that belongs to a system."""
    return Score.COSINE if system is None else DENSITY_MEASURES[system.density].score


def _quality(system: System) -> Quality:
    """Returns what a system ranks images by: its confidence; a backbone alone has the length of the features."""
    return Quality.FEATURE_NORM if system is None else DENSITY_MEASURES[system.density].quality


def _show_percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _results(blocks: Blocks) -> Iterable[tuple[tuple[str, System], Results]]:
    """Yields the results of every row."""
    for backbone, block in blocks.items():
        for system, several in block.items():
            for results in several:
                yield (backbone, system), results


def _shown_fars(measured: list[TemplateResult]) -> list[str]:
    """Returns the published table's rates where all were measured, or else the lowest ones that were."""
    fars = {far for result in measured for far in result.tar_at_far[_AVERAGE]}
    if fars.issuperset(_PUBLISHED_FARS):
        return list(_PUBLISHED_FARS)
    return sorted(fars, key=float)[:_FARS_OF_SMALL_SETS]


def _template_table(
    blocks: Blocks, key: str, title: str, matcher_of: Callable[[System], Matcher], about: str
) -> SystemTable:
    by_protocol: dict[str, dict[tuple[str, System], TemplateResult]] = {}
    for row, results in _results(blocks):
        for protocol, result in (results.templates.in_order() if results.templates else {}).items():
            by_protocol.setdefault(protocol, {})[row] = result
    columns = []
    for protocol, found in by_protocol.items():
        for far in _shown_fars(list(found.values())):
            rates = {row: result.tar_at_far.get(matcher_of(row[1]), {}) for row, result in found.items()}
            values = {row: rate[far] for row, rate in rates.items() if far in rate}
            columns.append(Column(f"{protocol} {float(far):.0e}", values, _show_percent))
    return SystemTable(key, title, "TAR [%] @ FAR", list(blocks), columns, about)


def _with_published(table: SystemTable) -> SystemTable:
    """Puts the paper's numbers beside those of its own data sets; if none is there, all of them beside all."""
    known = check_published(table.backbones)

    def published(number: int) -> Column:
        protocol, far = _PUBLISHED_COLUMNS[number]
        values = {
            (backbone, system): numbers[number] / 100
            for backbone, rows in known.items()
            for system, numbers in rows.items()
        }
        return Column(f"{protocol} {float(far):.0e}, paper", values, _show_percent)

    of_paper = {f"{protocol} {float(far):.0e}": i for i, (protocol, far) in enumerate(_PUBLISHED_COLUMNS)}
    shared = [column.title for column in table.columns if column.title in of_paper]
    columns = []
    for column in table.columns:
        columns += [column] + ([published(of_paper[column.title])] if column.title in of_paper else [])
    if not shared:
        columns += map(published, of_paper.values())
    about = f"{table.about} Paper: Li et al., CVPR 2021, ResNet100; it has no PFE-v."
    return SystemTable(table.key, table.title, table.corner, table.backbones, columns, about)


def _verification_table(blocks: Blocks) -> SystemTable:
    values: dict[str, dict[tuple[str, System], float]] = {}
    for row, results in _results(blocks):
        for name, result in (results.verification.in_order() if results.verification else {}).items():
            values.setdefault(name, {})
            if _score(row[1]) in result.by_score:
                values[name][row] = result.by_score[_score(row[1])].accuracy
    return SystemTable(
        "verification",
        "Verification of pairs of images",
        "10-fold accuracy [%]",
        list(blocks),
        [Column(name, found, _show_percent) for name, found in values.items()],
        "The backbone by cosine; + SYSTEM by Eqn (13) or the mutual likelihood score. By cosine all rows of a backbone "
        "are the same.",
    )


def _risk_table(blocks: Blocks) -> SystemTable:
    found: dict[str, dict[tuple[str, System], RejectionResult]] = {}
    for row, results in _results(blocks):
        if results.rejection is not None:
            found.setdefault(results.rejection.name, {})[row] = results.rejection
    columns, chance = [], []
    for name, by_row in found.items():
        areas, correlations = {}, {}
        for row, result in by_row.items():
            quality = _quality(row[1])
            if quality in result.areas:
                areas[row] = result.areas[quality]
            if quality in result.images.measures:
                correlations[row] = result.images.measures[quality].severity_spearman
        columns.append(Column(f"{name}, area", areas, lambda area: f"{area:.5f}", min))
        known = {row: value for row, value in correlations.items() if value is not None}
        if known:
            columns.append(Column(f"{name}, Spearman", known, lambda correlation: f"{correlation:.4f}", min))
        random = next(iter(by_row.values())).areas.get(Quality.RANDOM)
        chance += [] if random is None else [f"{random:.5f} on {name}"]
    return SystemTable(
        "risk",
        "Risk-controlled recognition",
        "rejected by confidence",
        list(blocks),
        columns,
        "Area under error versus reject, smaller is better: pairs by cosine, the least confident rejected first; at "
        f"random {', '.join(chance)}. Spearman: rank correlation of an image's confidence with its known severity, -1 "
        "is best. The confidence of a backbone alone is the length of its features.",
    )
