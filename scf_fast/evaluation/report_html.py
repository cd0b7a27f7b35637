"""report.html: a page that needs nothing but itself; style and figures are in it."""

import base64
from typing import Any

from scf_fast.evaluation.results import FigureKind, ReportFigure
from scf_fast.evaluation.tables import Table
from scf_fast.pipelines.text import as_html

_STYLE = """
:root { --ink: #1d2430; --quiet: #667080; --line: #dfe3ea; --back: #f5f6f8; --card: #ffffff; --accent: #2f6db3; }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 0 0 12px; }
section, figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 18px 0 0;
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 10px 0 0; color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 14px; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; } .word { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; } tbody tr:hover { background: var(--back); }
.about, .notes { color: var(--quiet); font-size: 13px; margin: 12px 0 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 18px; margin-top: 18px; }
.figures figure { margin: 0; padding: 12px; } .figures .wide { grid-column: 1 / -1; }
figcaption { color: var(--quiet); font-size: 13px; } img { width: 100%; height: auto; display: block; }
@media (max-width: 520px) { .figures { grid-template-columns: 1fr; } }
"""


def make_page(
    title: str,
    request: dict[str, Any],
    tables: list[Table],
    figures: dict[str, list[ReportFigure]],
    notes: list[str],
) -> str:
    """Returns the page.

    Args:
        request: what was asked for, shown under the title.
        figures: by the name of the model.
    """
    facts = {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in request.items()}
    facts_list = "".join(f"<dt>{as_html(key)}</dt><dd>{as_html(value)}</dd>" for key, value in facts.items())
    sections = "".join(map(table_html, tables))
    notes_list = f"<ul class=notes>{''.join(f'<li>{as_html(note)}</li>' for note in notes)}</ul>" if notes else ""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, "
        "initial-scale=1'>"
        f"<title>{as_html(title)}</title><style>{_STYLE}</style><main><h1>{as_html(title)}</h1><dl>{facts_list}</dl>"
        f"{sections}{notes_list}<div class=figures>{_figures_html(figures)}</div></main></html>\n"
    )


def table_html(table: Table) -> str:
    """Returns a table as a section of the page."""
    words = table.word_columns()

    def row_html(row: list[str], tag: str, number: int | None = None) -> str:
        cells = []
        for column, (cell, word) in enumerate(zip(row, words)):
            text = as_html(cell)
            shown = f"<b>{text}</b>" if (number, column) in table.best else text
            cells.append(f"<{tag}{' class=word' * word}>{shown}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(row_html(row, "td", number) for number, row in enumerate(table.rows))
    about = f"<p class=about>{as_html(table.about)}</p>" if table.about else ""
    return (
        f"<section><h2>{as_html(table.title)}</h2><div class=scroll><table><thead>{row_html(table.header, 'th')}"
        f"</thead><tbody>{body}</tbody></table></div>{about}</section>"
    )


def _figures_html(figures: dict[str, list[ReportFigure]]) -> str:
    """Returns all figures, the same figure of every model in one row."""
    kinds = list(FigureKind)
    by_file = {model: {figure.file_name: figure for figure in several} for model, several in figures.items()}
    order = sorted({(kinds.index(figure.kind), figure.file_name) for several in figures.values() for figure in several})
    return "".join(
        _figure_html(by_file[model][file_name], model if len(figures) > 1 else "")
        for _, file_name in order
        for model in figures
        if file_name in by_file[model]
    )


def _figure_html(figure: ReportFigure, model: str) -> str:
    kind = " class=wide" if figure.kind.is_wide else ""
    caption = f"<figcaption>{as_html(model)}</figcaption>" if model else ""
    data = base64.b64encode(figure.png).decode()
    image = f"<img alt='{as_html(figure.title)}' src='data:image/png;base64,{data}'>"
    return f"<figure{kind}>{image}{caption}</figure>"
