"""Text that comes from outside, made safe to show: names of files and folders, values, messages of libraries.

    printable     one line of visible characters, for logs, messages and plain tables
    as_markdown   the same, for Markdown: a pipe, a tag or a link in a name stays text
    as_html       for HTML, content or attribute
    as_latex      for LaTeX
    as_plot_text  for matplotlib, which takes what stands between dollars for a formula
    shown         a value as messages quote it, cut where it is long
    shown_names   several names in a row, the first few of them
    is_utf8       whether a name can be written as UTF-8
    one_line      a whole message, as commands and logs write it
    accept_all_text   makes a stream write what its encoding lacks

:func:`printable` is idempotent, so a message may hold names that were escaped already. All others start from it.
"""

import codecs
import html
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

LONGEST_VALUE = 200  # characters of a value in a message
_LONGEST_MESSAGE = 4000  # characters: a path can have 4096 bytes, and whoever reads it has typed it
_CUT = " ... "  # in place of what is left out
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF  # how os.fsdecode keeps the bytes of a name that are not UTF-8

# What Markdown (CommonMark, GitHub's tables, formulas and links) could take for more than text, wherever it stands. A
# backslash is one only before punctuation and at the end, an underscore only at the edge of a word. A unit in brackets,
# as our own headers have it, is no link.
_PUNCTUATION = re.escape(string.punctuation)
_IN_MARKDOWN = re.compile(
    r"(?P<unit>\[[a-z%/ ]+\](?![(\[:]))"
    rf"|[`*\[\]<|~$]|\\(?=[{_PUNCTUATION}]|$)|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|:(?=//)|(?<=www)\.",
    re.IGNORECASE,
)
# And where it stands at the beginning of a block: a heading, a quotation, a list, a line under a heading.
_MARKDOWN_START = re.compile(r"^(\d*)(#{1,6}(?=\s|$)|>|[-+](?=\s|$)|(?<=\d)[.)](?=\s|$)|=+$|-+$)")
_IN_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "κ": r"$\kappa$",
    "±": r"$\pm$",
}
# Our own tables in a terminal that has ASCII alone: as wide as before.
_IN_ASCII = str.maketrans("–—±×κσµμ·²³’‘“”…", "--~xksuu.23''\"\".")


def printable(text: object) -> str:
    """Returns a text in one line, with everything that cannot be seen written as an escape.

    Control characters, marks that turn the direction of writing, blanks of zero or unusual width, unassigned and
    surrogate characters appear as in a Python literal (``\\n``, ``\\x1b``, ``\\u202e``); a byte of a file name that is
    not UTF-8 as ``\\x`` and two digits, so a control character from U+0080 on is ``\\u0085``. A backslash stays as it
    is.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    if _FIRST_BYTE <= code <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return _NAMED.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_utf8(name: str) -> bool:
    """Tells whether the bytes of a file's name, which os.fsdecode has turned to text, are UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:  # of what stands for the other bytes
        return False
    return True


def as_markdown(text: object, begins_block: bool = False) -> str:
    """Returns a text as Markdown shows it letter by letter, in a line, a cell of a table or the name of a link.

    Args:
        begins_block: whether a paragraph or an entry of a list begins with it.
    """
    escaped = _IN_MARKDOWN.sub(lambda found: found[0] if found["unit"] else f"\\{found[0]}", printable(text))
    return _MARKDOWN_START.sub(r"\1\\\2", escaped) if begins_block else escaped


def as_html(text: object) -> str:
    """Returns a text as HTML shows it letter by letter, as content or in a quoted attribute."""
    return html.escape(printable(text))


def as_latex(text: object) -> str:
    """Returns a text as LaTeX shows it letter by letter, outside of formulas."""
    return "".join(_IN_LATEX.get(character, character) for character in printable(text))


def as_plot_text(text: object) -> str:
    """Returns a text as a title or a label of matplotlib shows it letter by letter."""
    return printable(text).replace("$", r"\$")


def shorten(text: str, at_most: int = LONGEST_VALUE) -> str:
    """Returns a text of at most ``at_most`` characters: where it is longer, its beginning and its end."""
    if len(text) <= at_most:
        return text
    tail = (at_most - len(_CUT)) // 3
    return text[: at_most - len(_CUT) - tail] + _CUT + text[len(text) - tail :]


def shown(value: Any, at_most: int = LONGEST_VALUE) -> str:
    """Returns a value as a message quotes it: between quotes where it is text, escaped, and cut where it is long.

    Args:
        value: bytes are taken as UTF-8.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value[: 4 * at_most + 4]).decode(errors="surrogateescape")
    if not isinstance(value, str):
        return shorten(printable(repr(value)), at_most)
    quote = '"' if "'" in value and '"' not in value else "'"
    return f"{quote}{shorten(printable(value), at_most)}{quote}"


def shown_names(names: Sequence[object], at_most: int = 4) -> str:
    """Returns names with commas between, the first few of them, for a message."""
    first = ", ".join(shorten(printable(name)) for name in names[:at_most])
    return f"{first} and {len(names) - at_most} more" if len(names) > at_most else first


# A quoted value; an apostrophe within a word opens none.
_TOO_LONG = f"{{{LONGEST_VALUE + 1},}}"
_QUOTED = re.compile(rf"""(?<![^\s(\[{{=,:])(?:'(?:[^'\\]|\\.){_TOO_LONG}'|"(?:[^"\\]|\\.){_TOO_LONG}")(?!\w)""")


def one_line(message: object) -> str:
    """Returns a message as one printable line, in which quoted values are cut to ``LONGEST_VALUE`` characters."""
    text = printable(message)
    if len(text) > LONGEST_VALUE:
        text = _QUOTED.sub(lambda found: found[0][0] + shorten(found[0][1:-1]) + found[0][0], text)
    return shorten(text, _LONGEST_MESSAGE)


def _replace_unknown(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    plain = unknown.translate(_IN_ASCII)
    return "".join(c if c.isascii() else _escape(c) for c in plain), error.end


_ERRORS = "scf_fast_readable"
codecs.register_error(_ERRORS, _replace_unknown)


def accept_all_text(streams: Iterable[TextIO]) -> None:
    """Makes text streams write what their encoding lacks in a readable form, where they would raise an error."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)  # what a test or a notebook puts there may have none
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)
