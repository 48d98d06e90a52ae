"""Fill a volume with a model's files: resume, verify, publish, and drop versions that are no longer wanted.

Runs in the image of KServe's storage initializer, with Python's standard library alone. Arguments: the address of the
model, the directory to publish it in, and how many versions stay beside the one that is being filled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

INITIALIZER = "/storage-initializer/scripts/initializer-entrypoint"
CHUNK = 1 << 24


def fill(uri: str, target: Path, kept_versions: int, initializer: str = INITIALIZER) -> str | None:
    """Publish the model in `target`; return why that failed, or None."""
    if (target / "config.json").exists():
        target.touch()
        print(f"{target} already holds {uri}.")
        return None
    prune(target, kept_versions)
    partial = target.with_name(f".{target.name}")
    # The directory of an earlier try is kept: the Hugging Face client resumes in it.
    if code := subprocess.run([initializer, uri, str(partial)]).returncode:
        return f"The download ended with exit code {code}; the next try resumes it."
    problems = 0
    for path, problem in damage(partial):
        print(f"{path.relative_to(partial)} {problem}.")
        path.unlink(missing_ok=True)
        problems += 1
    if problems:
        return f"{problems} files are not what they should be; the next try downloads those again."
    # The kubelet makes an empty directory for a replica that started first.
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    target.touch()
    print(f"{target} holds {uri}.")
    return None


def prune(target: Path, kept_versions: int) -> None:
    """Delete versions beside `target`, those that were asked for last excepted, and other versions' partial files."""
    siblings = [path for path in target.parent.iterdir() if re.fullmatch(r"\.?[0-9a-f]{12}", path.name)]
    published = [path for path in siblings if path != target and (path / "config.json").exists()]
    published.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    partial = [path for path in siblings if path.name.startswith(".") and path.name != f".{target.name}"]
    for path in [*published[kept_versions:], *partial]:
        print(f"Deleting {path}.")
        shutil.rmtree(path)


def damage(model: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that are missing or damaged, each with what is wrong with it."""
    if not (model / "config.json").exists():
        yield model / "config.json", "is missing"
    for index in model.glob("*.index.json"):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if index.name.startswith("model.safetensors") and not (model / name).exists():
                yield model / name, f"is missing, and {index.name} lists it"
    for weights in sorted(model.glob("*.safetensors")):
        if (size := weights.stat().st_size) != (expected := safetensors_size(weights)):
            yield weights, f"has {size} bytes, and its header says {expected}"
    # The Hugging Face client notes the SHA-256 of each large file beside the download.
    notes = model / ".cache" / "huggingface" / "download"
    for note in sorted(notes.rglob("*.metadata")):
        file = model / note.relative_to(notes).with_suffix("")
        expected_hash = note.read_text().splitlines()[1]
        if re.fullmatch(r"[0-9a-f]{64}", expected_hash) and file.exists() and sha256(file) != expected_hash:
            yield file, f"does not have the SHA-256 {expected_hash}"


def safetensors_size(path: Path) -> int | None:
    """Return the size that the header of a safetensors file implies; None when it has no header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length < CHUNK * 6 else b"")
        except ValueError:
            return None
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(fill(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
