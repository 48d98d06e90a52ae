"""The server's flags in the chart and the docs come from their declaration in `model_server.settings`."""

from __future__ import annotations

import json
from dataclasses import fields, make_dataclass

import pytest

from charts import render_server
from model_server import settings
from model_server.flag_types import integer


def test_chart_and_docs_hold_what_is_generated() -> None:
    assert render_server.differing() == [], "run `python -m charts.render_server`"


def test_a_new_flag_reaches_values_schema_template_and_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = settings.flag(integer(1, 9), 5, "how many cats sit beside the server")
    [added] = fields(make_dataclass("Added", [("num_cats", int, flag)]))
    monkeypatch.setattr(render_server, "flag_fields", lambda: {**settings.flag_fields(), "num_cats": added})
    files = {path.name: text for path, text in render_server.rendered().items()}
    assert "  # -- How many cats sit beside the server.\n  numCats: 5\n" in files["values.yaml"]
    schema = json.loads(files["values.schema.json"])["properties"]["server"]
    assert schema["properties"]["numCats"] == {"type": "integer", "minimum": 1, "maximum": 9}
    assert "numCats" in schema["required"]
    assert "\nnumCats=5\n" in files["_defaults.tpl"]
    assert "| `--num_cats` | 5 | how many cats sit beside the server |" in files["settings.md"]
