"""Escapes against readers that are not ours: markdown-it for Markdown, html.parser for HTML, Python's own for names."""

import codecs
import io
import logging
import os
import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from scf_fast.pipelines.command import LineFormatter, Parser, print_lines, run
from scf_fast.pipelines.errors import InputError
from scf_fast.pipelines.text import (
    LONGEST_VALUE,
    accept_all_text,
    as_html,
    as_latex,
    as_markdown,
    as_plot_text,
    one_line,
    printable,
    shown,
    shown_names,
)

UNSEEN = "\n\r\t\0\x1b\x7f\x85\xa0\xad\u061c\u200b\u200e\u200f\u2028\u202e\u2066\u3000\ud800\ufeff\U000e0041"
NASTY = [
    "a|b",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://a/b.png)",
    "<javascript:alert(1)>",
    "http://a.b www.a.b",
    "a_b_c _d_ __e__ f_",
    "*a* **b** ~~c~~ `d` $e$",
    "&lt; &#60; &amp",
    "[%] [a b] [a](b) [a][b] [a]: b [^1] [ ] a]",
    "\\| \\\\ \\* \\n \\",
    "# a",
    "> a",
    "- a",
    "1. a",
    "1) a",
    "===",
    "---",
    "+",
    "|",
    "a  b",
]


@pytest.mark.parametrize("character", UNSEEN)
def test_what_cannot_be_seen_is_written_out(character):
    written = printable(f"a{character}b")
    assert written.isprintable() and character not in written
    assert codecs.decode(written, "unicode_escape") == f"a{character}b"


@given(st.text())
def test_a_printable_text_is_one_line_and_stays_as_it_is(text):
    once = printable(text)
    assert once.isprintable() and printable(once) == once
    assert not text.isprintable() or once == text


def test_names_that_are_no_utf_8_keep_their_bytes():
    name = os.fsdecode("人脸".encode("gbk"))
    assert printable(name) == r"\xc8\xcb\xc1\xb3"
    assert printable("\x85") == r"\u0085"  # a character, which is another thing than the byte
    assert printable("人脸 κ ± é \N{GRINNING FACE}") == "人脸 κ ± é \N{GRINNING FACE}"


def markdown_text(markdown):
    """The text that a page shows; fails where there is more than text in it."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    (inline,) = [token for token in reader.parse(markdown) if token.type == "inline"][-1:]
    kinds = {token.type for token in inline.children}
    assert kinds <= {"text", "text_special"}, kinds
    return "".join(token.content for token in inline.children)


def blanks_as_shown(text):
    return re.sub(r"\s+", " ", text).strip()


SPECIAL = st.text("ab1 |\\`*_[](){}<>#+-.!~$&;:=/\"'^w\n", max_size=12)


@settings(max_examples=300)
@given(st.one_of(st.sampled_from(NASTY), SPECIAL))
def test_markdown_shows_letter_by_letter(text):
    text = text.strip(" ")
    seen = printable(text)
    if seen:
        assert blanks_as_shown(markdown_text(as_markdown(text, begins_block=True))) == blanks_as_shown(seen)
        assert blanks_as_shown(markdown_text(f"## {as_markdown(text)}.")) == blanks_as_shown(f"{seen}.")
    cell = f"| h |\n| --- |\n| {as_markdown(text)} |"
    assert blanks_as_shown(markdown_text(cell)) == blanks_as_shown(seen)
    (image,) = MarkdownIt("commonmark").parse(f"![f, {as_markdown(text)}](file.png)")[1].children
    assert image.type == "image" and image.attrs["src"] == "file.png"
    assert blanks_as_shown(image.content.replace("\\", "")) == blanks_as_shown(f"f, {seen}".replace("\\", ""))


def test_our_own_headers_look_the_same_in_a_terminal():
    for header in ("TAR [%]", "TAR [%] @ FAR", "PFE-v, Eqn (13)", "+ SCF-G", "-0.5", "lfw_bin", "0.98 ± 0.01", "1/σ²"):
        assert as_markdown(header) == header


@pytest.mark.parametrize("name", [*NASTY, "\"'><img src=x onerror=alert(1)>", f"a{UNSEEN}b"])
def test_html_shows_letter_by_letter(name):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, attrs))

        def handle_data(self, data):
            found.append(data)

    Reader().feed(f"<p title='{as_html(name)}'>{as_html(name)}")
    (tag, attributes), *data = found
    assert tag == "p" and attributes == [("title", printable(name))] and "".join(data) == printable(name)


def test_latex_and_figures_take_names_as_text():
    assert as_latex("a_b\\c^~{1}%&$#\n<|>") == (
        r"a\_b\textbackslash{}c\textasciicircum{}\textasciitilde{}\{1\}\%\&\$\#\textbackslash{}n"
        r"\textless{}\textbar{}\textgreater{}"
    )
    from matplotlib.text import Text

    for name in NASTY + ["$\\frac$", "a$", "\\$", "$$"]:
        shown_text, is_formula = Text(text=as_plot_text(name))._preprocess_math(as_plot_text(name))
        assert (shown_text, is_formula) == (printable(name), False)


def test_values_in_messages_are_cut():
    assert shown("a'b") == '"a\'b"' and shown(b"\xff\n") == r"'\xff\n'" and shown(3.5) == "3.5"
    assert len(shown("x" * 10_000)) == LONGEST_VALUE + 2 and len(shown(b"x" * 10_000, 80)) == 82
    assert len(shown(["x" * 50] * 50)) == LONGEST_VALUE
    long = one_line(f"--lr must be float, got {'x' * 5000!r}; it is the rank's business, not the file's {'y ' * 200}")
    assert long.startswith("--lr must be float, got 'xxx") and "the rank's business, not the file's y y" in long
    assert len(re.search("'x.*x'", long)[0]) == LONGEST_VALUE + 2
    assert len(one_line("/" + "a/" * 100_000)) < 4100
    assert shown_names(["a\n", "b"]) == r"a\n, b" and shown_names([*"abcdef"]) == "a, b, c, d and 2 more"


def ascii_stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", newline="\n")


def written(stream):
    stream.flush()
    return stream.buffer.getvalue().decode("ascii")


def test_streams_that_lack_letters_get_others(monkeypatch):
    out = ascii_stream()
    accept_all_text((out,))
    out.write("κ 0.98 ± 0.01 – “é” 人 \ud800\udcff")
    assert written(out) == 'k 0.98 ~ 0.01 - "\\u00e9" \\u4eba \\ud800\\xff'
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    accept_all_text((latin, object()))  # the second cannot be set up, and needs not
    latin.write("é ± κ")
    latin.flush()
    assert latin.buffer.getvalue() == "é ± k".encode("latin-1")


def test_commands_end_well_on_an_ascii_terminal(monkeypatch):
    out, err = ascii_stream(), ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    parser = Parser(prog="prog", description="κ of faces")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0 and "k of faces" in written(out)
    assert run("prog", lambda: print_lines("κ", "a\nb")) == 0
    assert written(out).endswith("k\na\\nb\n")
    monkeypatch.delenv("RANK", raising=False)

    def fail():
        raise InputError("no 人\n2026-12-01 all is well")

    assert run("prog", fail) == 2
    assert written(err) == "prog: error: no \\u4eba\\n2026-12-01 all is well\n"
    with pytest.raises(SystemExit):
        parser.parse_args(["--x\n" + "y" * 9999])
    assert written(err).count("\n") == 2 and len(written(err)) < 4300


def test_a_name_cannot_forge_a_log_line():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.handle(logging.makeLogRecord({"msg": "broken: %s", "args": ("a\n12:00:00 done\x1b[2J\u202e",)}))
    assert re.fullmatch(r"[\d:]{8} broken: a\\n12:00:00 done\\x1b\[2J\\u202e\n", stream.getvalue())
