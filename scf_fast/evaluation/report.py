"""The report folder: results.json, report.md with its figures, and report.html, which stands alone."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scf_fast.errors import InputError
from scf_fast.evaluation.published_table import SystemTable, TableFormat, render, system_tables_as_json
from scf_fast.evaluation.report_html import make_page
from scf_fast.evaluation.results import FIGURE_FILE, Measured
from scf_fast.evaluation.tables import Table, make_tables, tables_as_text
from scf_fast.pipelines.formats.atomic_file import write_bytes, write_json, write_text
from scf_fast.pipelines.text import as_markdown

RESULTS_FILE, MARKDOWN_FILE, HTML_FILE = "results.json", "report.md", "report.html"
_PATHS = ("model", "data", "gallery", "probe", "backbone", "models")  # of a request
Request = dict[str, Any]  # everything asked for that decides the numbers, as results.json keeps it


@dataclass
class ModelReport:
    """One model: where it is from, its measurements, and how long they took."""

    path: str  # of its weights, as the user gave it
    measured: Measured
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Returns the model's entry in results.json."""
        return {"model": self.path} | self.measured.results.as_json() | {"seconds": {"evaluation": self.seconds}}


@dataclass
class Report:
    """An evaluation of one or several models."""

    request: Request
    models: dict[str, ModelReport]  # by name
    system_tables: list[SystemTable] = field(default_factory=list)  # shown before the others

    def notes(self) -> list[str]:
        """Returns what was left out and why, every note once."""
        return list(dict.fromkeys(note for model in self.models.values() for note in model.measured.notes))

    def as_text(self) -> str:
        """Returns tables and notes as Markdown that is fit for a terminal."""
        return tables_as_text(self.tables(), self.notes())

    def tables(self) -> list[Table]:
        """Returns all tables."""
        models = {name: model.measured.results for name, model in self.models.items()}
        return [table.as_table() for table in self.system_tables] + make_tables(models)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of results.json: a single model's results at the top, those of several under "models"."""
        entries = {name: model.as_json() for name, model in self.models.items()}
        results = next(iter(entries.values())) if len(entries) == 1 else {"models": entries}
        tables = {"tables": system_tables_as_json(self.system_tables)} if self.system_tables else {}
        return {"request": self.request, "notes": self.notes()} | tables | results

    def write(self, out: Path) -> None:
        """Writes the report folder, made if missing; results.json comes last.

        Figures of an earlier report are removed.
        """
        out.mkdir(parents=True, exist_ok=True)
        for path in out.glob("*.png"):
            if FIGURE_FILE.fullmatch(path.name):
                path.unlink()
        several = len(self.models) > 1
        links = []
        for number, (name, model) in enumerate(self.models.items(), 1):
            for figure in model.measured.figures:
                file_name = f"model{number}-{figure.file_name}" if several else figure.file_name
                write_bytes(out / file_name, figure.png)
                of_model = f", {name}" if several else ""
                links.append(f"![{as_markdown(figure.title + of_model)}]({file_name})")
            for file_name, text in model.measured.files.items():
                write_text(out / file_name, text)
        title = f"Evaluation of {', '.join(self.models)}"
        write_text(out / MARKDOWN_FILE, "\n\n".join([f"# {as_markdown(title)}", self.as_text(), *links]) + "\n")
        figures = {name: model.measured.figures for name, model in self.models.items()}
        write_text(out / HTML_FILE, make_page(title, self.request, self.tables(), figures, self.notes()))
        if self.system_tables:
            for table_format in TableFormat:
                write_text(out / table_format.file_name, render(self.system_tables, table_format) + "\n")
        write_json(out / RESULTS_FILE, self.as_json(), indent=2, end="\n", allow_nan=False)


def check_folder(out: Path, request: Request, overwrite: bool) -> None:
    """Refuses a folder that holds the report of another evaluation, before any work is done.

    Raises:
        InputError: the folder holds another report or an unreadable one and overwrite is False, or ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} must be a folder, and is a file; give another --out")
    path = out / RESULTS_FILE
    if overwrite or not path.exists():
        return
    try:
        earlier = json.loads(path.read_text())["request"]
        different = ", ".join(
            f"{key} {earlier.get(key)} -> {value}"
            for key, value in request.items()
            if not _is_same(key, earlier.get(key), value)
        )
        is_same = not different and earlier.keys() <= request.keys()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no JSON, or of another form
        raise InputError(f"{path} is no evaluation result; give another --out, or --overwrite") from None
    if not is_same:
        raise InputError(f"{out} holds another evaluation ({different}); give another --out, or --overwrite")


def _is_same(key: str, earlier: Any, value: Any) -> bool:
    """Tells whether a part of a request is what it was, however its paths are spelled."""
    if key in _PATHS and isinstance(earlier, list) and isinstance(value, list):
        return len(earlier) == len(value) and all(_is_same(key, a, b) for a, b in zip(earlier, value))
    if key in _PATHS and isinstance(earlier, str) and isinstance(value, str):
        return earlier == value or os.path.realpath(earlier) == os.path.realpath(value)
    return earlier == value
