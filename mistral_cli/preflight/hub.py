"""Asks the model hub whether a token opens a repository: one request for the head of `config.json`, no download."""

from __future__ import annotations

import httpx

from .answer import Answer
from .release import HUB

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 15


def url(address: str, endpoint: str = "") -> str:
    """Return where the hub keeps the `config.json` of `hf://owner/model[:revision]`."""
    repository, _, revision = address.removeprefix(HUB).partition(":")
    return f"{(endpoint or ENDPOINT).rstrip('/')}/{repository}/resolve/{revision or 'main'}/config.json"


def look(address: str, token: str, endpoint: str) -> Answer[int]:
    """Return the status that the hub answers."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return Answer(httpx.head(url(address, endpoint), headers=headers, timeout=TIMEOUT_S).status_code)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Answer(unknown=f"{endpoint or ENDPOINT} does not answer this machine: {error or type(error).__name__}")
