"""Imports point one way: what each module may know of the others and of the large libraries."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "model_server").glob("*.py"))
MAY_IMPORT = {
    "torch": {
        *("weights", "reader", "fusion", "capacity"),
        *("memory", "slots", "spans", "attention", "decoder", "graphs", "runner", "transfer"),
        *("sampling", "generation", "telling", "shared_lane", "own_lane", "engine"),
    },
    "kserve": {"model", "server", "__main__"},
    "fastapi": {"routes", "http", "openai_routes", "openapi", "playground"},
    "kubernetes": set(),
}
KNOW_NOTHING_OF_OURS = {"errors", "heap", "metrics", "logs", "pauses", "prefixes", "progress", "transfer"}


def imports(source: Path) -> set[str]:
    """Return the first word of every import: `torch`, or `.errors` for one of ours."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            found |= {f".{node.module or alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_large_library_is_imported_only_where_its_idea_lives(library):
    importers = {source.stem for source in SOURCES if library in imports(source)}
    assert importers <= MAY_IMPORT[library]


@pytest.mark.parametrize("module", sorted(KNOW_NOTHING_OF_OURS))
def test_foundation_imports_nothing_of_ours(module):
    [source] = [source for source in SOURCES if source.stem == module]
    assert not {name for name in imports(source) if name.startswith((".", "model_server"))}


def test_request_knows_errors_and_nothing_else_of_ours():
    [source] = [source for source in SOURCES if source.stem == "request"]
    assert {name for name in imports(source) if name.startswith(".")} == {".errors"}


def test_only_the_entry_point_composes():
    importers = {source.stem for source in SOURCES if imports(source) & {".__main__", ".server"}}
    assert importers <= {"__main__"}
