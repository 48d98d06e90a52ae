"""The names of the image and of the weights are read in their parts."""

from __future__ import annotations

import pytest

from mistral_cli.preflight.release.artifacts import ImageReference, hub_url, parse_image


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("registry.example.com/a/b:1", ImageReference("registry.example.com", "a/b", "1", "")),
        ("registry.example.com:5000/a@sha256:1", ImageReference("registry.example.com:5000", "a", "", "sha256:1")),
        ("localhost/a:1@sha256:1", ImageReference("localhost", "a", "1", "sha256:1")),
        ("team/a:1", ImageReference("", "team/a", "1", "")),
        ("a", ImageReference("", "a", "", "")),
    ],
)
def test_an_image_is_read_in_its_parts(image: str, parts: ImageReference) -> None:
    assert parse_image(image) == parts


@pytest.mark.parametrize(
    ("address", "endpoint", "url"),
    [
        ("hf://a/b", "", "https://huggingface.co/a/b/resolve/main/config.json"),
        ("hf://a/b:c", "http://hub.example.com/", "http://hub.example.com/a/b/resolve/c/config.json"),
    ],
)
def test_an_address_of_the_hub_is_the_url_of_its_configuration(address: str, endpoint: str, url: str) -> None:
    assert hub_url(address, endpoint) == url
