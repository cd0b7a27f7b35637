"""The report with names that mean something to Markdown, HTML, LaTeX or a terminal."""

import json
import os
import re
from html.parser import HTMLParser

from markdown_it import MarkdownIt

from scf_fast.evaluation import plots
from scf_fast.evaluation.published_table import SYSTEMS, Column, SystemTable, TableFormat, render
from scf_fast.evaluation.report import ModelReport, Report
from scf_fast.evaluation.results import (
    BySet,
    FigureKind,
    Measured,
    PairMeasures,
    ReportFigure,
    Results,
    Score,
    VerificationResult,
)

NAMES = ["a|b\n## done", "<script>alert(1)</script>", "[x](javascript:alert(1))", "# $\\fr$", os.fsdecode(b"\xc8\xcb")]
SEEN = ["a|b\\n## done", *NAMES[1:4], "\\xc8\\xcb"]


def report_of(names):
    measures = PairMeasures(0.9, 0.01, 0.1, 0.95, {"1e-02": 0.5})
    models = {}
    for name in names:
        found = {name: VerificationResult(100, {Score.COSINE: measures})}
        measured = Measured(Results(verification=BySet(name, found)), notes=[f"{name} is a backbone alone"])
        measured.figures.append(ReportFigure(FigureKind.ROC, b"png"))
        models[name] = ModelReport(f"runs/{name}", measured, 1.0)
    column = Column("IJB-B", {(names[0], SYSTEMS[0]): 0.5}, str)
    tables = [SystemTable("t", f"of {names[1]}", "TAR [%]", names, [column], f"{names[2]} is one of them")]
    return Report({"command": "verify", "model": [f"runs/{name}" for name in names]}, models, tables)


def test_names_stay_text_in_every_form_of_the_report(tmp_path):
    report = report_of(NAMES)
    report.write(tmp_path)
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.*") if path.suffix != ".png"}
    assert all(line.isprintable() for text in pages.values() for line in text.splitlines())

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(pages["report.md"])
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    assert {token.type for token in inline} <= {"text", "text_special", "image", "strong_open", "strong_close"}
    images = [token.attrs["src"] for token in inline if token.type == "image"]
    assert images == [f"model{number}-roc.png" for number in range(1, 6)]
    assert not any(token.type == "html_block" for token in tokens)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 3  # the title and two tables
    cells = {"".join(c.content for c in token.children) for token in tokens if token.type == "inline"}
    assert cells >= set(SEEN) and {f"{name} is a backbone alone" for name in SEEN} <= cells

    tags, texts = set(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            assert not any(name.startswith("on") or "javascript:" in (value or "") for name, value in attrs)

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(pages["report.html"])
    assert "script" not in tags and "a" not in tags and set(SEEN) <= set(texts)
    assert json.loads(pages["results.json"])["request"]["model"] == [f"runs/{name}" for name in NAMES]
    assert json.loads(pages["table.json"])["t"]["rows"][0]["backbone"] == NAMES[0]
    rows = [line for line in pages["table.tex"].splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(NAMES) * len(SYSTEMS) and all(len(re.findall(r"(?<!\\)&", row)) == 1 for row in rows)


def test_tables_are_aligned_after_the_escapes():
    tables = report_of(NAMES).system_tables
    for form in (TableFormat.MARKDOWN, TableFormat.TEXT):
        lines = [line for line in render(tables, form).splitlines() if "–" in line or "0.5" in line]
        assert len({len(line) for line in lines}) == 1


def test_figures_take_any_name():
    curve = ([0.1, 1.0], [0.5, 1.0])
    assert plots.plot_roc("$\\frac$", {(name, "cosine"): curve for name in NAMES}).startswith(b"\x89PNG")
