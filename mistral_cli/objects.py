"""Kubernetes objects as plain dicts, as the API sends them: custom resources have no classes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

Object = Mapping[str, Any]

SUFFIXES: dict[str, Decimal | int] = {
    "": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


def dig(tree: Any, *keys: str) -> Any:
    """Return the value under these keys, or None if one of them is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def condition(thing: Object, kind: str) -> Object:
    """Return one condition of an object's status; empty when it has none."""
    for found in dig(thing, "status", "conditions") or ():
        if found.get("type") == kind:
            return dict(found)
    return {}


def image_of(pod_spec: Object) -> str:
    """Return the image of the server: KServe runs the first container."""
    containers = pod_spec.get("containers") or [{}]
    return str(containers[0].get("image", ""))


def time_of(text: str | None) -> datetime | None:
    """Read a Kubernetes timestamp."""
    return datetime.fromisoformat(text) if text else None


def quantity(text: object) -> Decimal:
    """Read a Kubernetes quantity: 500m, 16Gi, 1."""
    quantity_text = str(text)
    digits = quantity_text.rstrip("kMGTEPKim")
    return Decimal(digits) * SUFFIXES[quantity_text[len(digits) :]]
