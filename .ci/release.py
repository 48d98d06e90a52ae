#!/usr/bin/env python3
"""Steps of a release that need no registry: Python's standard library and Helm.

.ci/release.py set 0.2.0                  write the version into every file that has it
.ci/release.py check v0.2.0               the tag, the files and the changelog name one version
.ci/release.py notes                      print the changelog's section of the version
.ci/release.py chart IMAGE@DIGEST DIR     package the chart with this image inside; print the package's path
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHART = Path("charts/mistral-7b")
PLACES = (
    ("pyproject.toml", r'^version = "(.+)"$'),
    ("model_server/__init__.py", r'^__version__ = "(.+)"$'),
    (f"{CHART}/Chart.yaml", r"^version: (.+)$"),
    (f"{CHART}/Chart.yaml", r'^appVersion: "(.+)"$'),
    (f"{CHART}/files/kustomization.yaml", r'app\.kubernetes\.io/version: "(.+)"$'),
    ("manifests/jobs/batch.yaml", r"image: \S+/mistral-7b-kserve:(.+)$"),
)
"""Each file that has the version, and where. `make manifests` writes it into the rendered files."""
IMAGE = re.compile(r"(?P<repository>[^@\s]+)@(?P<digest>sha256:[0-9a-f]{64})")


def version() -> str:
    """Return the version of pyproject.toml."""
    return _found(*PLACES[0])[1]


def set_version(new: str) -> None:
    """Write the version into every file that has it."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", new):
        raise SystemExit(f"{new!r} is not a version such as 0.2.0.")
    for path, pattern in PLACES:
        found = _found(path, pattern)
        text = found.string[: found.start(1)] + new + found.string[found.end(1) :]
        (ROOT / path).write_text(text, encoding="utf-8")


def check(tag: str) -> None:
    """Refuse a tag that a file or the changelog contradicts."""
    for path, pattern in PLACES:
        if tag != f"v{(has := _found(path, pattern)[1])}":
            raise SystemExit(f"The tag is {tag}, and {path} has version {has}, whose tag is v{has}.")
    notes()


def notes() -> str:
    """Return the changelog's section of the version, without its heading."""
    found = re.search(rf"^## \[{re.escape(version())}\] - \S+\n(.*?)(?=^## \[|\Z)", _read("CHANGELOG.md"), re.M | re.S)
    if not found or not found[1].strip():
        raise SystemExit(f"CHANGELOG.md has no entries under `## [{version()}] - <date>`.")
    return found[1].strip()


def chart(image: str, directory: Path) -> Path:
    """Package the chart with the image and its digest as defaults, and return the package."""
    named = IMAGE.fullmatch(image)
    if not named:
        raise SystemExit(f"{image!r} does not name an image by digest, such as registry.example.com/name@sha256:...")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(ROOT / CHART, Path(temporary) / CHART.name))
        values = copy / "values.yaml"
        text = values.read_text(encoding="utf-8")
        for name, value in named.groupdict().items():
            # The first key of this name below `image:` is the server's.
            text, replaced = re.subn(rf'(?ms)(^image:\n.*?^  {name}: )""$', rf"\g<1>{value}", text, count=1)
            if not replaced:
                raise SystemExit(f"{CHART}/values.yaml has no empty image.{name}.")
        values.write_text(text, encoding="utf-8")
        _helm("package", str(copy), "--version", version(), "--app-version", version(), "--destination", str(directory))
    return directory / f"{CHART.name}-{version()}.tgz"


def _helm(*arguments: str) -> None:
    installed = ROOT / ".venv/bin/helm"
    subprocess.run([str(installed) if installed.exists() else "helm", *arguments], check=True, stdout=sys.stderr)


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _found(path: str, pattern: str) -> re.Match[str]:
    found = re.search(pattern, _read(path), re.MULTILINE)
    if not found:
        raise SystemExit(f"{path} has no version where {pattern!r} matches.")
    return found


def main() -> None:
    match sys.argv[1:]:
        case ["set", new]:
            set_version(new)
        case ["check", tag]:
            check(tag)
        case ["notes"]:
            print(notes())
        case ["chart", image, directory]:
            print(chart(image, Path(directory)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
