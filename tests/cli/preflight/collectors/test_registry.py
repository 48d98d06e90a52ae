"""The registry is asked over HTTP, as container runtimes ask it."""

from __future__ import annotations

import base64
import json

from mistral_cli.preflight.collectors import registry
from tests.support.artifact_server import DIGEST, serving_artifacts


def test_a_manifest_tells_digest_and_platforms() -> None:
    with serving_artifacts() as held:
        found = registry.manifest(f"{held.image}:1", []).value
    assert found is not None
    assert (found.digest, found.platforms) == (DIGEST, {"linux/amd64", "linux/arm64"})


def test_the_platform_of_a_single_image_is_read_from_its_configuration() -> None:
    with serving_artifacts() as held:
        held.single, held.platforms = True, ("linux/arm64",)
        found = registry.manifest(f"{held.image}:1", []).value
    assert found is not None
    assert found.platforms == {"linux/arm64"}


def test_the_pull_secret_of_its_registry_opens_a_private_image() -> None:
    with serving_artifacts() as held:
        held.private = True
        auths = {"auths": {held.host: {"username": "user", "password": "password"}}}
        secret = {"data": {".dockerconfigjson": base64.b64encode(json.dumps(auths).encode()).decode()}}
        foreign = {"data": {".dockerconfigjson": base64.b64encode(b'{"auths": {"other": {}}}').decode()}}
        assert registry.manifest(f"{held.image}:1", [foreign, secret]).value is not None
        assert registry.manifest(f"{held.image}:1", [foreign]).refused


def test_a_registry_that_does_not_answer_is_unknown_and_not_missing() -> None:
    found = registry.manifest("127.0.0.1:9/a:1", [])
    assert "gives no manifest to this machine" in found.unknown
