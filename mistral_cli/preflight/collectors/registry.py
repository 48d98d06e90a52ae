"""Asks an image's registry for its manifest: digest and platforms, over the registry's HTTP API (OCI distribution 1.1).

Credentials are those of the pods' image pull Secrets, sent to the registry they belong to and shown nowhere.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import httpx

from mistral_cli.objects import Object
from mistral_cli.preflight.observed import Answer, Manifest
from mistral_cli.preflight.release.artifacts import ImageReference, parse_image

TIMEOUT_S = 15
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
IMAGES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")


def manifest(image: str, secrets: Iterable[Object]) -> Answer[Manifest]:
    """Return the manifest; None: the registry has no such image; refused: it asks for a login."""
    reference = parse_image(image)
    scheme = "http" if reference.host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"
    base = f"{scheme}://{reference.host}/v2/{reference.path}"
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=True) as http:
            return _manifest(http, base, reference, credentials(reference.host, secrets))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        return Answer(unknown=f"{reference.host} gives no manifest to this machine: {error or type(error).__name__}")


def _manifest(http: httpx.Client, base: str, reference: ImageReference, login: str) -> Answer[Manifest]:
    url = f"{base}/manifests/{reference.digest or reference.tag or 'latest'}"
    headers = {"Accept": ", ".join((*INDEXES, *IMAGES))}
    response = http.get(url, headers=headers)
    if response.status_code == 401 and (token := _token(http, response.headers.get("www-authenticate", ""), login)):
        headers["Authorization"] = token
        response = http.get(url, headers=headers)
    if response.status_code in (401, 403):
        return Answer(refused=f"{reference.host} answers {response.status_code}")
    if response.status_code == 404:
        return Answer(None)
    response.raise_for_status()
    body = response.json()
    digest = reference.digest or response.headers.get("docker-content-digest", "")
    if "manifests" in body:
        listed = [each.get("platform") or {} for each in body["manifests"]]
    else:
        blob = http.get(f"{base}/blobs/{body['config']['digest']}", headers=headers)
        blob.raise_for_status()
        listed = [blob.json()]
    return Answer(Manifest(digest, frozenset(f"{each.get('os')}/{each.get('architecture')}" for each in listed)))


def _token(http: httpx.Client, challenge: str, login: str) -> str:
    """Return the header that the challenge asks for; empty where there is none to send."""
    scheme, _, rest = challenge.partition(" ")
    if scheme.lower() == "basic":
        return f"Basic {login}" if login else ""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    if scheme.lower() != "bearer" or "realm" not in asked:
        return ""
    query = {key: asked[key] for key in ("service", "scope") if key in asked}
    headers = {"Authorization": f"Basic {login}"} if login else {}
    answer = http.get(asked["realm"], params=query, headers=headers)
    if answer.status_code != 200:
        return ""
    token = answer.json().get("token") or answer.json().get("access_token")
    return f"Bearer {token}" if token else ""


def credentials(host: str, secrets: Iterable[Object]) -> str:
    """Return user and password for a registry, in base64, from Secrets of type dockerconfigjson."""
    for secret in secrets:
        encoded = (secret.get("data") or {}).get(".dockerconfigjson")
        for server, entry in _entries(encoded).items() if encoded else ():
            if server.removeprefix("https://").partition("/")[0] != host:
                continue
            if entry.get("auth"):
                return str(entry["auth"])
            pair = f"{entry.get('username', '')}:{entry.get('password', '')}"
            return base64.b64encode(pair.encode()).decode()
    return ""


def _entries(encoded: str) -> Mapping[str, Any]:
    try:
        return dict(json.loads(base64.b64decode(encoded))["auths"])
    except (ValueError, KeyError, TypeError):
        return {}
