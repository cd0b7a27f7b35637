"""Text files that people and other programs have written: UTF-8 with or without a mark, line ends of any system.

Bytes that are not UTF-8 stay in the text as ``os.fsdecode`` keeps them, so that the name of a file leads to the file.
Anything else than such text is refused by name (:mod:`scf_fast.pipelines.formats.file_kinds`), UTF-16 too.
"""

import codecs
from collections.abc import Iterator

from scf_fast.pipelines.aliases import Progress, StrPath
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.formats.file_kinds import Wanted, recognize

LONGEST_LINE = 1 << 16  # bytes
_BLOCK = 1 << 14  # lines


def check_text(path: StrPath, wanted: Wanted = Wanted.TEXT) -> None:
    """Checks that a file is text.

    Args:
        wanted: what it is given as, for the message.
    Raises:
        InputError: it is something else; the message says what, and what to do.
        OSError: it cannot be read.
    """
    kind = recognize(path)
    if not kind.is_text:
        raise InputError(f"{path} must be text in UTF-8, and is {kind.name}; {kind.advice(wanted)}")


def read_text_bytes(path: StrPath, wanted: Wanted = Wanted.TEXT, at_most: int = -1) -> bytes:
    """Returns what is in a text file, without the mark at its start; raises what :func:`check_text` does, but takes an
    empty file.

    Args:
        at_most: bytes read; -1 is all.
    """
    with open(path, "rb") as file:
        content = file.read(at_most)
    if content:
        check_text(path, wanted)
    return content.removeprefix(codecs.BOM_UTF8)


def read_text(path: StrPath, wanted: Wanted = Wanted.TEXT, at_most: int = -1) -> str:
    """Returns a text file's text with ``\\n`` as line end; see :func:`read_text_bytes`."""
    text = read_text_bytes(path, wanted, at_most).decode(errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: StrPath, progress: Progress, wanted: Wanted = Wanted.DATA) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, byte at which it starts, line) for the lines of a text file that are not empty; a line beyond
    64 KB comes in pieces. Raises what :func:`check_text` does.
    """
    check_text(path, wanted)
    end = reported = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), b""), 1):
            start, end = end, end + len(line)
            if number % _BLOCK == 0:
                progress(end - reported)
                reported = end
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                start, line = start + len(codecs.BOM_UTF8), line[len(codecs.BOM_UTF8) :]
            if line.strip():
                yield number, start, line
