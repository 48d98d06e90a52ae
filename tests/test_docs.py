"""The README and the docs name only what exists, and have one sentence a line."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@page
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_every_link_to_a_heading_finds_it(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text())

    assert [
        (file, anchor) for file, anchor in links if anchor not in anchors(page.parent / file if file else page)
    ] == []


@page
def test_every_make_target_exists(page: Path) -> None:
    named = set(re.findall(r"(?:`|^ {4}|^```sh\n)make ([a-z][a-z-]+)", page.read_text(), flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    assert named <= targets


def test_every_entry_of_the_readmes_tree_exists() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert tree is not None
    entries = [line.split()[0] for line in tree[1].splitlines()]

    assert [entry for entry in entries if not (ROOT / entry).exists()] == []


@functools.cache
def python_files() -> set[str]:
    folders = (path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name for folder in folders for path in folder.rglob("*.py")}


@page
def test_every_module_named_exists(page: Path) -> None:
    modules = set(re.findall(r"`((?:model_server|tests|benchmarks|demo)/[\w/]+\.py)`", page.read_text()))
    alone = set(re.findall(r"`\*{0,2}(\w+\.py)\*{0,2}`", page.read_text()))
    known = python_files()

    assert [name for name in modules if not (ROOT / name).exists()] == []
    assert alone - {"utils.py"} <= known  # which is named as what there is not


def prose(page: Path) -> list[list[str]]:
    """The paragraphs of a page and the items of its lists, each as its lines: no headings, tables or code."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^( {4,}|[#|<!]).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *(?:-|\d+\.) ", "\n", text, flags=re.MULTILINE)
    return [block.strip().splitlines() for block in re.split(r"\n\s*\n", text) if block.strip()]


@page
def test_every_line_of_prose_ends_with_its_sentence(page: Path) -> None:
    lines = [line for block in prose(page) for line in block[:-1]]

    assert [line for line in lines if not re.search(r"[.:?!][)`\"*]*$", line)] == []


@page
def test_no_line_of_a_paragraph_holds_two_sentences(page: Path) -> None:
    lines = [line for block in prose(page) for line in block]

    assert [line for line in lines if re.search(r"[a-z0-9)`][.?!] (?=[A-Z])", re.sub(r"`[^`]*`", "x", line))] == []


@page
def test_no_paragraph_has_more_than_80_words(page: Path) -> None:
    blocks = [" ".join(block) for block in prose(page)]

    assert [block for block in blocks if len(block.split()) > 80] == []
