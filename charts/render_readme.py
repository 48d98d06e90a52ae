"""Make `charts/mistral-7b/README.md`: its template, with a table made of the comments in `values.yaml`.

`# -- text` above a key describes it, `# -- (type) text` where the default is null: as for helm-docs, which
makes the same table (`--sort-values-order file`).
Owns the table; the words around it are in `README.md.gotmpl`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).parent / "mistral-7b"
PLACEHOLDER = '{{ template "chart.valuesTable" . }}'
TYPES = {bool: "bool", int: "int", float: "float", str: "string", list: "list", dict: "object"}


class Value(NamedTuple):
    """One described key of `values.yaml`."""

    path: tuple[str, ...]
    default: Any
    description: str

    def row(self) -> str:
        """Return the key's line of the table."""
        match = re.fullmatch(r"(?:\((\w+)\) )?(.*)", self.description)
        assert match is not None
        kind = match[1] or TYPES[type(self.default)]
        cells = (".".join(self.path), kind, f"`{json.dumps(self.default)}`", match[2])
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def described_values(text: str) -> Iterator[Value]:
    """Yield the keys with a `# --` comment, in the order of the file."""
    values = yaml.safe_load(text)
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*# ?(-- )?(.*)", line):
            if match[1]:
                comment = [match[2]]
            elif comment:
                comment.append(match[2])
        elif match := re.match(r"( *)([\w-]+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment:
                default = values
                for key in path:
                    default = default[key]
                yield Value(tuple(path), default, " ".join(comment))
            comment = []
        else:
            comment = []


def readme(chart: Path = CHART) -> str:
    """Return the README as it should be."""
    values = described_values((chart / "values.yaml").read_text())
    table = ["| Key | Type | Default | Description |", "|-----|------|---------|-------------|"]
    table += [value.row() for value in values]
    version = yaml.safe_load((chart / "Chart.yaml").read_text())["version"]
    template = (chart / "README.md.gotmpl").read_text()
    return template.replace(PLACEHOLDER, "\n".join(table)).replace("{{ .Version }}", version)
