"""Asks the registry, the model hub and the resolver, from the machine that runs the command.

The hub is asked for the head of `config.json`: the answer shows whether a token opens the repository, without a
download. Tokens are sent to the hub and never printed.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Sequence

import httpx

from mistral_cli.objects import Object, dig
from mistral_cli.preflight.collectors import registry
from mistral_cli.preflight.observed import Answer, External, Manifest, Observed
from mistral_cli.preflight.release.artifacts import HUB_ENDPOINT, HUB_TOKEN, hub_url, parse_image
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.rollout.planning.preconditions import RESOLVED_BY_NAME

TIMEOUT_S = 15


def read(release: Release, observed: Observed, namespace: str) -> External:
    """Ask everything, with the credentials of the Secrets that the cluster has."""
    uses = release.secrets(observed.account.value)
    secrets = {use.name: observed.secrets.get(use.name, Answer()).value for use in uses}
    pull_secrets = [secret for use in uses if use.pulls_images and (secret := secrets[use.name])]
    tokens = [found for use in uses if HUB_TOKEN in use.keys and (found := _token(secrets[use.name]))]
    token = tokens[0] if tokens else ""
    endpoint = release.hub_endpoint or os.environ.get("HF_ENDPOINT", "")
    host = observed.host(namespace)
    return External(
        image=_image(release.image, pull_secrets),
        repositories={each: hub_status(each, token, endpoint) for each in release.hub_addresses},
        hosts={host: resolve(host)} if host else {},
    )


def hub_status(address: str, token: str, endpoint: str) -> Answer[int]:
    """Return the HTTP status of the hub's answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return Answer(httpx.head(hub_url(address, endpoint), headers=headers, timeout=TIMEOUT_S).status_code)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = error or type(error).__name__
        return Answer(unknown=f"{endpoint or HUB_ENDPOINT} does not answer this machine: {reason}")


def resolve(host: str) -> Answer[str]:
    """Return the address of a host; None: it has none here."""
    try:
        return Answer(str(socket.getaddrinfo(host, None)[0][4][0]))
    except (OSError, UnicodeError):
        return Answer(None)


def _image(image: str, pull_secrets: Sequence[Object]) -> Answer[Manifest]:
    if image.startswith(RESOLVED_BY_NAME) or not parse_image(image).host:
        return Answer()
    return registry.manifest(image, pull_secrets)


def _token(secret: Object | None) -> str:
    try:
        return base64.b64decode((dig(secret, "data") or {}).get(HUB_TOKEN, "")).decode().strip()
    except ValueError:
        return ""
