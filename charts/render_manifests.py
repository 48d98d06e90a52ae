"""Write `manifests/` from the chart, a file per scenario for `kubectl apply -f`, base and overlays for `-k`.

Owns what `make manifests` writes; nothing there is edited by hand but `manifests/cluster/`, which no chart
can hold. An overlay is the difference between its scenario and the base, as JSON patches: the two forms
cannot drift apart.
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
HEADER = "# Rendered from charts/mistral-7b by `make manifests`; edit the chart.\n"

Object = dict[str, Any]
Key = tuple[str, str]


def tool(name: str) -> str:
    """Return the path of a command: the one beside this Python (installed by pip) before the system's."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed: run `make setup`, or put it on the PATH.")
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


def overlay(scenario: str) -> dict[str, str]:
    """Return the files of a scenario's overlay by their names."""
    base, wanted = load(render()), load(render(scenario))
    added = [o for key, o in wanted.items() if key not in base]
    patches: list[Object] = []
    for (kind, name), old in base.items():
        new = wanted.get((kind, name))
        if new is None:
            metadata = {k: v for k, v in old["metadata"].items() if k in ("name", "namespace")}
            gone = {"apiVersion": old["apiVersion"], "kind": kind, "metadata": metadata, "$patch": "delete"}
            patches.append({"patch": _dump(gone)})
        elif operations := difference(old, new):
            patches.append({"target": {"kind": kind, "name": name}, "patch": _dump(operations)})
    kustomization: Object = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base", *(["added.yaml"] if added else [])],
    }
    if patches:
        kustomization["patches"] = patches
    files = {"kustomization.yaml": HEADER + _dump(kustomization)}
    if added:
        files["added.yaml"] = HEADER + yaml.dump_all(added, Dumper=_Dumper, sort_keys=False, width=1000)
    return files


def difference(old: Any, new: Any, path: str = "") -> list[Object]:
    """Return the JSON patch (RFC 6902) that makes `old` into `new`."""
    if type(old) is not type(new) or not isinstance(old, dict | list):
        same = type(old) is type(new) and old == new  # Python has True equal to 1
        return [] if same else [{"op": "replace", "path": path, "value": new}]
    if isinstance(old, list):
        if len(old) != len(new):
            return [{"op": "replace", "path": path, "value": new}]
        pairs = enumerate(zip(old, new, strict=True))
        return [operation for i, (a, b) in pairs for operation in difference(a, b, f"{path}/{i}")]
    operations = []
    for key in [*old, *(key for key in new if key not in old)]:
        at = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
        if key not in new:
            operations.append({"op": "remove", "path": at})
        elif key not in old:
            operations.append({"op": "add", "path": at, "value": new[key]})
        else:
            operations += difference(old[key], new[key], at)
    return operations


def manifests() -> dict[str, str]:
    """Return every rendered file by its path below `manifests/`."""
    files = {f"{scenario}.yaml": HEADER + render(scenario) for scenario in scenarios()}
    files["base/resources.yaml"] = HEADER + render()
    base = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["resources.yaml"],
    }
    files["base/kustomization.yaml"] = HEADER + _dump(base)
    for scenario in scenarios():
        files |= {f"overlays/{scenario}/{name}": text for name, text in overlay(scenario).items()}
    return files


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)


def main() -> None:
    """Write the files and the chart's README, and take away what no scenario renders any more."""
    files = manifests()
    for path in MANIFESTS.rglob("*.yaml"):
        name = path.relative_to(MANIFESTS).as_posix()
        if name not in files and not name.startswith("cluster/"):
            path.unlink()
    for name, text in files.items():
        path = MANIFESTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (CHART / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
