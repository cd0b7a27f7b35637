"""Tables as text: Markdown for pages, aligned columns for the terminal."""

from collections.abc import Sequence

NOT_MEASURED = "not measured"


def markdown_table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table in which None reads "not measured"."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(NOT_MEASURED if cell is None else str(cell) for cell in line) + " |" for line in lines
    )


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns columns aligned to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (head, *rows))
