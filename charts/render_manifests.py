"""Write the rendered part of `manifests/` from the chart: the base, two quick starts, and what overlays add.

The patches of the overlays and `manifests/cluster/` are written by hand. A test compares each overlay with the chart.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from charts.render_readme import CHART, readme

MANIFESTS = Path(__file__).parent.parent / "manifests"
RELEASE = NAMESPACE = "mistral"
IMAGE = "registry.example.com/mistral-7b-kserve"
NO_TAG = "set-your-image"
"""The tag of the placeholder image: kustomize's `images:` replaces it, and Knative's error shows it."""
DASHBOARD = ("ConfigMap", "mistral-7b-dashboard")
"""Made by kustomize from the chart's file, so that it stands once."""
HEADER = "# Rendered from charts/mistral-7b by `make manifests`; edit the chart.\n"

Object = dict[str, Any]
Key = tuple[str, str]


def tool(name: str) -> str:
    """Return the path of a command: the one beside this Python (installed by pip) before the system's."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed. `make test` installs it beside this Python.")
    return found


def helm_template(*arguments: str, chart: Path = CHART, release: str = "mistral-7b", hooks: bool = False) -> str:
    """Return what Helm renders; hooks only when wanted, and a placeholder for an image that no values file names.

    Raises:
        subprocess.CalledProcessError: Helm refuses; its words are in `stderr`.
    """
    command = [tool("helm"), "template", release, str(chart), "--namespace", NAMESPACE, "--values", "-"]
    command += [] if hooks else ["--no-hooks"]
    image = json.dumps({"image": {"repository": IMAGE}})
    return subprocess.run([*command, *arguments], input=image, check=True, capture_output=True, text=True).stdout


def scenarios() -> dict[str, Path]:
    """Return the values file of each scenario by the scenario's name."""
    return {path.name.removesuffix("-values.yaml"): path for path in sorted(CHART.glob("ci/*-values.yaml"))}


@cache
def render(scenario: str | None = None) -> str:
    """Return the manifest of a scenario; without one of `gfd`, the chart's defaults and the token they need."""
    return helm_template("--values", str(scenarios()[scenario or "gfd"]))


def load(text: str) -> dict[Key, Object]:
    """Return the objects of a manifest by kind and name."""
    return {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(text) if o}


def for_kubectl(objects: dict[Key, Object]) -> dict[Key, Object]:
    """Return the objects without what only Helm may say of them, and with an image that names what is missing."""
    for o in objects.values():
        for kind, keys in (
            ("labels", ("helm.sh/chart", "app.kubernetes.io/managed-by")),
            ("annotations", ("helm.sh/resource-policy",)),
        ):
            for key in keys:
                o["metadata"].get(kind, {}).pop(key, None)
            if not o["metadata"].get(kind, True):
                del o["metadata"][kind]
    for o in objects.values():
        for container in o.get("spec", {}).get("predictor", {}).get("containers", []):
            if container["image"].startswith(f"{IMAGE}:"):
                container["image"] = f"{IMAGE}:{NO_TAG}"
    return objects


def manifest(scenario: str) -> dict[Key, Object]:
    """Return the objects that kubectl applies for a scenario; the namespace is one of them."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    return {("Namespace", NAMESPACE): namespace, **for_kubectl(load(render(scenario)))}


def manifests() -> dict[str, str]:
    """Return every rendered file by its path below `manifests/`."""
    base = manifest("gfd")
    files = {"base/resources.yaml": base, "gfd.yaml": base, "minimal-cpu.yaml": manifest("minimal-cpu")}
    for path in sorted(MANIFESTS.glob("overlays/*/kustomization.yaml")):
        scenario = path.parent.name
        added = {key: o for key, o in manifest(scenario).items() if key not in base and key != DASHBOARD}
        if added:
            files[f"overlays/{scenario}/added.yaml"] = added
    return {name: HEADER + _dump(objects) for name, objects in files.items()}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and what fits on a line on one."""

    def represent_data(self, data: Any) -> yaml.Node:
        node = super().represent_data(data)
        if isinstance(node, yaml.CollectionNode):
            scalars = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
            plain = all(isinstance(part, yaml.ScalarNode) and "\n" not in part.value for part in scalars)
            node.flow_style = plain and sum(len(part.value) + 4 for part in scalars) <= 90
        return node


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _dump(objects: dict[Key, Object]) -> str:
    return yaml.dump_all(objects.values(), Dumper=_Dumper, sort_keys=False, width=1000)


def main() -> None:
    """Write the files and the chart's README."""
    for name, text in manifests().items():
        (MANIFESTS / name).write_text(text)
    (CHART / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
