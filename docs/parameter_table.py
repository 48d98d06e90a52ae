"""Writes the table of parameters and the list of refused names into docs/api.md, from their declarations.

python -m docs.parameter_table            write them
python -m docs.parameter_table --check    exit with 1 if docs/api.md differs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from model_server.api.v1.parameters import UNSUPPORTED, GenerateParameters, about
from model_server.api.validation import allowed, describe, schema_of

PAGE = Path(__file__).with_name("api.md")


def table() -> str:
    """Return the table of parameters."""
    schema = schema_of(GenerateParameters)
    known = about(GenerateParameters)
    lines = ["| parameter | allowed | default | batched | meaning |", "|---|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = known[name].default or ("none" if field["default"] is None else describe(field["default"]))
        cells = (f"`{name}`", allowed(field, schema["$defs"]), default, known[name].batched, field["description"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def refused() -> str:
    """Return the list of refused names, those with one reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED.items():
        names.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(group)}: {reason}." for reason, group in names.items())


def rendered(page: str) -> str:
    """Return the page with what is generated between its markers."""
    for name, text in (("parameters", table()), ("refused names", refused())):
        begin, end = f"<!-- generated: {name} -->\n", f"\n<!-- end of {name} -->"
        page, count = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            (begin + text + end).replace("\\", r"\\"),
            page,
            flags=re.DOTALL,
        )
        assert count == 1, f"{PAGE} must have one place for the {name}"
    return page


def main() -> int:
    """Write the page, or compare it; return the exit code."""
    page = PAGE.read_text()
    if "--check" in sys.argv[1:]:
        if page != rendered(page):
            print(f"{PAGE} differs from the declarations: run python -m docs.parameter_table", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(rendered(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
