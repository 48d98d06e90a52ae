"""The relay's settings: `MISTRAL_RELAY_<NAME>` in the environment. A wrong value stops the start with a sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PREFIX = "MISTRAL_RELAY_"
HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*\.?", re.IGNORECASE)


class SettingsError(Exception):
    """`str(error)` names the variable, its value and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """The relay's settings."""

    upstream_url: str
    """The InferenceService's address inside the cluster, such as http://mistral-7b.mistral.svc.cluster.local."""
    database: Path = Path("/data/relay.sqlite")
    port: int = 8080
    concurrency: int = 32
    """Requests sent to the model at once."""
    max_queue_size: int = 10_000
    """Requests that may wait; the next one gets 429."""
    max_request_bytes: int = 256 * 1024
    upstream_timeout_s: int = 3600
    """Time limit of one answer of the model, cold start included."""
    retention_s: int = 86_400
    """How long a finished request is kept."""
    api_key_file: Path | None = None
    """One key a line; without it every caller is served."""
    upstream_key_file: Path | None = None
    """The key for the model's server, in the first line of the file."""
    webhook_hosts: tuple[str, ...] = ()
    """Host names that webhooks may go to; without any, requests with a webhook are refused."""
    webhook_secret_file: Path | None = None
    """A Standard Webhooks secret (`whsec_...`); needed once there are webhook hosts."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read and check the settings.

        Raises:
            SettingsError: a variable is unknown, missing or wrong.
        """
        known = {PREFIX + field.name.upper(): field.name for field in fields(cls)}
        if unknown := sorted(name for name in environ if name.startswith(PREFIX) and name not in known):
            raise SettingsError(f"{unknown[0]} is not a setting; the settings are {', '.join(sorted(known))}.")
        values: dict[str, Any] = {}
        for variable, name in known.items():
            if variable in environ:
                try:
                    values[name] = _READERS[name](environ[variable])
                except ValueError as error:
                    raise SettingsError(f"{variable}={environ[variable]!r}: {error}.") from None
        if "upstream_url" not in values:
            raise SettingsError(f"{PREFIX}UPSTREAM_URL is missing: the address of the InferenceService.")
        settings = cls(**values)
        if settings.webhook_hosts and settings.webhook_secret_file is None:
            raise SettingsError(f"{PREFIX}WEBHOOK_SECRET_FILE is missing: webhooks are signed.")
        return settings


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(text)

    return read


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise ValueError("must be an http or https URL without a query")
    return text.rstrip("/")


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower().rstrip(".") for host in text.split(",") if host.strip())
    for host in hosts:
        if not HOST.fullmatch(host):
            raise ValueError(f"{host!r} is not a host name; write names, comma-separated, without scheme and port")
    return hosts


_READERS: dict[str, Callable[[str], Any]] = {
    "upstream_url": _url,
    "database": Path,
    "port": _integer(1, 65535),
    "concurrency": _integer(1, 1024),
    "max_queue_size": _integer(1, 10_000_000),
    "max_request_bytes": _integer(1024, 16 * 1024 * 1024),
    "upstream_timeout_s": _integer(1, 86_400),
    "retention_s": _integer(0, 30 * 86_400),
    "api_key_file": Path,
    "upstream_key_file": Path,
    "webhook_hosts": _hosts,
    "webhook_secret_file": Path,
}
