"""Decodes the Secrets in which Helm stores its releases, which it sends as protobuf. Leaves out all other objects.

The field numbers are those of `generated.proto` in k8s.io/apimachinery (Unknown, ObjectMeta) and k8s.io/api (Secret).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def decode(body: bytes) -> dict[str, Any]:
    """Return the Secret in its JSON form."""
    raw = _one(body.removeprefix(MAGIC), 2)
    metadata = _one(raw, 1)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": _one(metadata, 1).decode(),
            "namespace": _one(metadata, 3).decode(),
            "labels": {key.decode(): value.decode() for key, value in _map(metadata, 11)},
        },
        "data": {key.decode(): base64.b64encode(value).decode() for key, value in _map(raw, 2)},
        "type": _one(raw, 3).decode(),
    }


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the length-delimited fields of a message; skip numbers."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 2:
            yield tag >> 3, message[at : at + value]
            at += value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def _one(message: bytes, field: int) -> bytes:
    return next((value for number, value in _fields(message) if number == field), b"")


def _map(message: bytes, field: int) -> list[tuple[bytes, bytes]]:
    return [(_one(entry, 1), _one(entry, 2)) for number, entry in _fields(message) if number == field]
