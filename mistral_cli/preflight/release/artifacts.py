"""The names of what the pods download: an image of a registry, and a repository of the model hub."""

from __future__ import annotations

from dataclasses import dataclass

HUB = "hf://"
HUB_ENDPOINT = "https://huggingface.co"
HUB_TOKEN = "HF_TOKEN"


@dataclass(frozen=True)
class ImageReference:
    """An image's name in parts."""

    host: str
    """Empty: the container runtime of the node decides."""
    path: str
    tag: str
    digest: str


def parse_image(image: str) -> ImageReference:
    """Read `host/path:tag@digest`."""
    rest, _, digest = image.partition("@")
    first, slash, path = rest.partition("/")
    has_host = bool(slash) and (first == "localhost" or "." in first or ":" in first)
    host, path = (first, path) if has_host else ("", rest)
    path, _, tag = path.partition(":")
    return ImageReference(host, path, tag, digest)


def hub_url(address: str, endpoint: str = "") -> str:
    """Return the URL of the `config.json` of `hf://owner/model[:revision]`."""
    repository, _, revision = address.removeprefix(HUB).partition(":")
    return f"{(endpoint or HUB_ENDPOINT).rstrip('/')}/{repository}/resolve/{revision or 'main'}/config.json"
