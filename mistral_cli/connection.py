"""The server's address and the API key, for all commands that send requests."""

from __future__ import annotations

import os
from pathlib import Path

from .endpoint import Endpoint, from_service, from_url
from .exit_codes import Misused

DEFAULT_URL = "http://127.0.0.1:8080"


def choose_endpoint(url: str | None, service: str | None, ingress: str | None) -> Endpoint:
    """Return the endpoint that the options and MISTRAL_URL name."""
    if service and url:
        raise Misused("Pass only one of --url and --service.")
    if ingress and not service:
        raise Misused("--ingress goes with --service.")
    if service:
        return from_service(service, ingress)
    return from_url(url or os.environ.get("MISTRAL_URL") or DEFAULT_URL)


def authorization(api_key_file: Path | None) -> dict[str, str]:
    """Return the header that carries the key; its value appears in no message."""
    key = os.environ.get("MISTRAL_API_KEY", "")
    if api_key_file is not None:
        try:
            key = api_key_file.read_text("utf-8").partition("\n")[0]
        except (OSError, UnicodeError) as error:
            raise Misused(f"--api-key-file {api_key_file} cannot be read.") from error
    key = key.strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise Misused("The API key has characters that an HTTP header cannot contain.")
    return {"Authorization": f"Api-Key {key}"}
