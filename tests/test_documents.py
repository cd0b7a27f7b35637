"""The documents name commands, files, functions and tests that exist."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "bench/NOTES.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("scf_fast", "kernels", "pipelines", "bench", "tests", "docs")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def quoted(text):
    """Returns what stands between single backticks outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(page):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_exist_and_are_looked_into():
    assert all(page.is_file() for page in PAGES) and len(PAGES) > 8
    assert len(re.findall(r"python -m scf_fast\.", "".join(page.read_text() for page in PAGES))) > 20


def test_commands_name_modules_that_can_be_run(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    for name in re.findall(r"\b(?:python|torchrun|deepspeed)\s+(?:-m|--module)\s+([\w.]*\w)", page.read_text()):
        assert name.partition(".")[0] not in ("kernels", "pipelines"), f"{name}: its name is scf_fast.{name}"
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        assert spec is not None, f"{page}: python -m {name}"


def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(file), f"{page}: {target}"


def test_paths_in_the_text_exist(page):
    for words in quoted(page.read_text()):
        for word in words.split():
            if word.partition("/")[0] in FOLDERS and "/" in word and not re.search(r"[<>{}*]|/[A-Z]", word):
                assert (ROOT / word.partition("::")[0]).exists(), f"{page}: {word}"


def test_names_in_the_text_can_be_imported(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    text = page.read_text()
    names = {name for code in quoted(text) for name in re.findall(r"(?:^|[\s@])(scf_fast(?:\.\w+)+)", code)}
    for module, imported in re.findall(r"from (scf_fast[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    for name in names:
        pkgutil.resolve_name(name)
    for code in quoted(text):
        assert not re.search(r"(?:^|\s)(?:kernels|pipelines)\.[a-z]", code), f"{code}: its name begins with scf_fast."


def test_tests_named_in_the_text_exist(page):
    names = {name for code in quoted(page.read_text()) for name in re.findall(r"\btest_\w+\b(?!\.py|/)", code)}
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py")) if names else ""
    for name in names:
        assert re.search(rf"^def {name}\(", sources, flags=re.M), f"{page}: {name}"


def test_the_log_of_situations_names_versions_and_tests_that_exist():
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    rows = re.findall(r"^\| (?!situation|-)(.+) \|$", (ROOT / "docs/compatibility.md").read_text(), flags=re.M)
    assert len(rows) >= 5
    for row in rows:
        situation, behavior, since, *tests = re.split(r"(?<!\\) \| ", row)
        assert situation and behavior and since in versions and len(tests) == 1, row
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests[0])
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.M), row
