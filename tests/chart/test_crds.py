"""KServe's objects of every scenario against KServe's CRDs, as strictly as an API server can be.

KServe's Python models know no patterns, no enums and no list keys. An extract of the CRDs is always applied; the CRDs
themselves where the environment variable KSERVE_CRDS names a directory that has a sub-directory with the files of
`config/crd/full` of kserve/kserve for each version of KServe.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.render_manifests import Object
from tests.support.helm import SCENARIOS, render
from tests.support.structural_schema import violations

EXTRACT = yaml.safe_load((Path(__file__).parents[1] / "support" / "kserve_schema.yaml").read_text())
DIRECTORY = os.environ.get("KSERVE_CRDS")
VERSIONS = sorted(path for path in Path(DIRECTORY).iterdir() if path.is_dir()) if DIRECTORY else []
needs_crds = pytest.mark.skipif(not VERSIONS, reason="KSERVE_CRDS names no directory with KServe's CRDs")
each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)


@cache
def schemas(version: Path) -> dict[str, Any]:
    """Return the schema of each kind that a version's CRDs define."""
    found = {}
    for path in version.rglob("*.yaml"):
        crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        if crd["kind"] == "CustomResourceDefinition":
            [stored] = [v for v in crd["spec"]["versions"] if v["storage"]]
            found[crd["spec"]["names"]["kind"]] = stored["schema"]["openAPIV3Schema"]
    return found


def kserves_objects(scenario: str) -> list[Object]:
    return [o for (kind, _), o in render(scenario=scenario).items() if kind in EXTRACT]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_extract_of_the_crds_accepts_every_scenario(scenario: str) -> None:
    for o in kserves_objects(scenario):
        assert not list(violations(o, EXTRACT[o["kind"]]))


@needs_crds
@each_version
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_crds_accept_every_scenario(scenario: str, version: Path) -> None:
    for o in kserves_objects(scenario):
        assert not list(violations(o, schemas(version)[o["kind"]]))


@needs_crds
@each_version
def test_the_extract_says_what_the_crds_say(version: Path) -> None:
    assert not [d for kind, schema in EXTRACT.items() for d in differences(schema, schemas(version)[kind], kind)]


def differences(ours: Any, theirs: Any, at: str) -> Iterator[str]:
    """Yield the rules of the extract that the CRD does not have in the same place."""
    for word, rule in ours.items():
        if word == "x-kubernetes-preserve-unknown-fields":
            continue
        if word in ("type", "format", "enum", "pattern", "minimum", "maximum") or word.startswith("x-kubernetes"):
            if theirs.get(word) != rule:
                yield f"{at} {word}: {rule} here, {theirs.get(word)} there"
        elif word == "required":
            yield from (f"{at} requires {name} only here" for name in rule if name not in theirs.get(word, []))
        elif word == "properties":
            for name, part in rule.items():
                yield from differences(part, theirs["properties"][name], f"{at}.{name}")
        else:
            yield from differences(rule, theirs[word], f"{at} {word}")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("scaleMetric",), "qps", "must be one of"),
        (("maxReplicas",), 3000000000, "out of bounds"),
        (("timeout",), "600", "must be of type integer"),
        (("name",), "7b", "must match"),
        (("containers", 0, "env"), [{"name": "A"}, {"name": "A"}], "duplicate entries"),
    ],
)
def test_what_the_python_models_let_through_would_be_noticed(path: tuple[Any, ...], value: Any, words: str) -> None:
    [service] = [o for o in yaml.safe_load(yaml.safe_dump(kserves_objects("gfd"))) if o["kind"] == "InferenceService"]
    part = service["spec"]["predictor"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert words in " ".join(violations(service, EXTRACT["InferenceService"]))
