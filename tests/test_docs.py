"""README.md, docs/ and CITATION.cff say what is there: links, files, commands, lines of slm.py."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^][]*\]\(([^()\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
FROM_SLM = re.compile(r"^<!-- from slm\.py -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(
    r"(?:^|\s)python (?:-m (?P<tool>tools\.[a-z_]+)|(?P<stage>[a-z_]+)\.py)\s(?P<rest>.*)"
)
FLAG = re.compile(r"--[a-z][a-z-]*")
FILE = re.compile(r"[\w./-]+\.(?:py|sh|md|cff)")
THEIRS = re.compile(r"^(?:data|out)/")  # folders that a run makes


def read(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """The page without its code blocks."""
    return BLOCK.sub("", read(page))


def anchors(page):
    """The names that GitHub gives the page's headings: {"run-it", ...}."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        assert name not in found, f"{page.name}: two headings are called {name}"
        found.add(name)
    return found


def commands(page):
    """(module, rest of the line) of every `python FILE.py ...` and `python -m tools.NAME ...`."""
    code = [block for _, block in BLOCK.findall(read(page))]
    code += [span.replace("\n", " ") for span in INLINE.findall(prose(page))]
    for text in code:
        for line in text.replace("\\\n", " ").splitlines():
            for found in PYTHON.finditer(line + " "):
                yield found["tool"] or found["stage"], found["rest"]


def flags_of(module, monkeypatch):
    """The flags of a stage's or tool's parser and of its subcommands; None if it has none."""

    class Built(Exception):
        pass

    def stop(parser, *_, **__):
        raise Built(parser)

    name = module
    if (ROOT / module.replace(".", "/") / "__main__.py").exists():
        name = f"{module}.__main__"
    imported = importlib.import_module(name)
    if not hasattr(imported, "arguments"):
        return None
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    try:
        imported.arguments()
    except Built as built:
        parser = built.args[0]
    monkeypatch.undo()
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return {flag for each in parsers for flag in each._option_string_actions}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page):
    for span in INLINE.findall(prose(page)):
        words = [word for word in span.split() if FILE.fullmatch(word)]
        for word in words:
            if not THEIRS.match(word):
                assert (ROOT / word).exists(), f"{page.name}: {word}"
    for script in re.findall(r"bash (runs/\w+\.sh)", read(page)):
        assert (ROOT / script).exists(), f"{page.name}: {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_uses_flags_that_exist(page, monkeypatch):
    known = {}
    for module, rest in commands(page):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{page.name}: {module}"
        if module not in known:
            known[module] = flags_of(module, monkeypatch)
        if known[module] is None:
            continue
        words = shlex.split(rest, comments=True)
        used = {word for word in words if FLAG.fullmatch(word)}
        assert used <= known[module], f"{page.name}: {module} {sorted(used - known[module])}"


def test_the_command_finder_finds():
    """A finder that finds nothing would pass every page."""
    found = [module for page in PAGES for module, _ in commands(page)]
    stages = {"prepare", "train_ref", "score", "train_slm", "eval_math"}
    assert stages <= set(found) and "tools.explore" in found and len(found) > 30


def test_readme_is_short_and_has_two_set_up_commands():
    text = read(ROOT / "README.md")
    assert len(text.encode()) <= 12_000
    assert [line for line in text.splitlines() if line.startswith("pip install -r")] == [
        "pip install -r requirements.txt && python train_slm.py --k 0.6",
        "pip install -r requirements-dev.txt && python -m pytest",
    ]


def test_the_method_in_readme_is_slm_py_word_for_word():
    code = read(ROOT / "slm.py")
    blocks = FROM_SLM.findall(read(ROOT / "README.md"))
    assert len(blocks) == 3
    for block in blocks:
        assert block in code, block


def test_every_page_is_reached_from_readme():
    linked = {Path(link.partition("#")[0]) for link in LINK.findall(prose(ROOT / "README.md"))}
    assert {page.relative_to(ROOT) for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md"], ids=lambda page: page.name)
def test_lines_are_wrapped(page):
    """Tables, pictures and code may be longer."""
    for line in prose(page).splitlines():
        table_or_picture = line.lstrip().startswith(("|", "!["))
        assert len(line) <= 100 or table_or_picture, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rows_of_a_table_are_equally_long(page):
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        lengths = {row.count("|") for row in table.splitlines()}
        assert len(lengths) == 1, f"{page.name}: {table}"


def test_every_dependency_has_its_reason():
    text = read(ROOT / "docs" / "contributing.md")
    for name in ("requirements.txt", "requirements-dev.txt"):
        for package in re.findall(r"^[a-z][\w-]*", read(ROOT / name), re.MULTILINE):
            assert f"`{package}`" in text, f"docs/contributing.md: {package} of {name}"


def test_citation_is_valid():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with huggingface-hub")
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] and citation["license"] == "MIT"
    holder = citation["authors"][0]["name"]
    assert holder in read(ROOT / "LICENSE")
    (paper,) = citation["references"]
    assert paper["type"] == "article" and paper["url"].endswith("2404.07965")
    assert all(author["family-names"] for author in paper["authors"])
