"""What a release needs is read from its objects alone."""

from __future__ import annotations

import pytest

from charts.render_manifests import render
from mistral_cli.preflight.release.manifests import parse

pytestmark = pytest.mark.chart


def test_the_secrets_of_pods_account_and_job_are_found_with_their_keys() -> None:
    found = {use.name: use.keys for use in parse(render("production")).secrets(None)}
    assert found == {"hf-token": {"HF_TOKEN"}, "mistral-7b-api-keys": {"api-keys"}}


def test_a_cached_release_downloads_in_its_job() -> None:
    release = parse(render("pvc-cache"))
    assert release.storage_uri.startswith("pvc://")
    assert [each.partition(":")[0] for each in release.hub_addresses] == ["hf"]
    assert release.claims() == ["mistral-7b-weights"]


def test_an_account_in_the_cluster_brings_its_own_secrets() -> None:
    release = parse(render("minimal-cpu").replace("kind: ServiceAccount", "kind: Other"))
    account = {"secrets": [{"name": "s3"}], "imagePullSecrets": [{"name": "pull"}]}
    assert [(use.name, use.pulls_images) for use in release.secrets(account)] == [("pull", True), ("s3", False)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kind: [", "not YAML"),
        ("just text", "no Kubernetes object"),
        ("kind: ConfigMap\nmetadata: {name: a}", "hold 0 InferenceServices"),
        ("kind: InferenceService\nmetadata: {name: a}\nspec: {predictor: {}}", "no custom predictor"),
    ],
)
def test_manifests_that_are_no_release_are_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(text)
