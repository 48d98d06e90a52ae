"""Where the weights come from, and the secrets beside them."""

from __future__ import annotations

import pytest

from tests.support.helm import (
    NONE,
    Values,
    container,
    environment,
    helm_test_pod,
    inference_service,
    predictor,
    render,
)


def test_the_weights_are_pinned_to_a_commit_by_default() -> None:
    name, revision = environment()["STORAGE_URI"].removeprefix("hf://").split(":")
    assert name == "mistralai/Mistral-7B-Instruct-v0.3"
    assert len(revision) == 40


def test_the_download_has_memory_of_its_own_and_takes_the_weights_once() -> None:
    [storage] = [o for (kind, _), o in render().items() if kind == "ClusterStorageContainer"]
    assert predictor()["storageContainerName"] == storage["metadata"]["name"]
    assert storage["spec"]["container"]["name"] == "storage-initializer"
    assert storage["spec"]["container"]["resources"]["limits"]["memory"] == "8Gi"
    assert '"consolidated*"' in storage["spec"]["container"]["env"][0]["value"]


def prefixes(values: Values = NONE, scenario: str | None = None) -> list[str]:
    [storage] = [o for (kind, _), o in render(values, scenario).items() if kind == "ClusterStorageContainer"]
    return [uri["prefix"] for uri in storage["spec"]["supportedUriFormats"]]


def test_the_download_settings_take_over_nobody_elses_downloads() -> None:
    """KServe picks the first container that fits an address; a bare hf:// would fit everybody's."""
    assert prefixes() == ["hf://mistralai/Mistral-7B-Instruct-v0.3"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hf://a/b:c170c708", "hf://a/b:eeee1111"),
        ("hf://a/b", "hf://a/b:main"),
        ("s3://bucket/models/v1", "s3://bucket/models/v2/"),
        ("https://host.example/models/v1.tar", "https://host.example/models/v2.tar"),
    ],
)
def test_an_older_revision_of_the_model_can_still_start_pods(old: str, new: str) -> None:
    """KServe refuses a pod whose address its ClusterStorageContainer does not list."""
    assert any(old.startswith(prefix) for prefix in prefixes({"storage.uri": new}))


def container_name(uri: str) -> str:
    return str(predictor({"storage.uri": uri})["storageContainerName"])


def test_another_model_gets_a_container_of_its_own_and_a_revision_of_the_model_keeps_it() -> None:
    """A container is kept when its release goes: found again, it would refuse the next model's address."""
    assert container_name("hf://a/b:1") == container_name("hf://a/b:2") != container_name("hf://a/c:1")


def test_an_older_model_can_still_start_pods_when_it_is_listed() -> None:
    listed = {"storage.uri": "hf://a/new:1", "storage.initializer.uriPrefixes": ["hf://a/old"]}
    assert prefixes(listed) == ["hf://a/new", "hf://a/old"]


def test_the_download_settings_outlive_a_change_to_a_cache() -> None:
    """The revision before the cache still names them when it starts a pod."""
    assert prefixes(scenario="pvc-cache") == prefixes()


def test_the_download_settings_outlive_the_release() -> None:
    [storage] = [o for (kind, _), o in render().items() if kind == "ClusterStorageContainer"]
    assert storage["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_download_has_the_environment_that_a_proxy_or_a_store_needs() -> None:
    values = {
        "storage.initializer.env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "storage.initializer.envFrom": [{"secretRef": {"name": "s3-keys"}}],
    }
    objects = render(values, "pvc-cache")
    [storage] = [o["spec"]["container"] for (kind, _), o in objects.items() if kind == "ClusterStorageContainer"]
    [job] = [o["spec"]["template"]["spec"]["containers"][0] for (kind, _), o in objects.items() if kind == "Job"]
    for download in (storage, job):
        assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in download["env"]
        assert download["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]


@pytest.mark.parametrize(
    "uri",
    [
        "pvc://claim/mistral",
        "oci://registry.example/mistral:1",
        "oci+native://registry.example/mistral:1",
        "oci+fetch://registry.example/mistral@sha256:" + "0" * 64,
    ],
)
def test_weights_from_a_volume_or_an_image_take_no_download_settings(uri: str) -> None:
    values = {"storage.uri": uri}
    assert environment(values)["STORAGE_URI"] == uri
    assert "storageContainerName" not in predictor(values)
    assert not any(kind == "ClusterStorageContainer" for kind, _ in render(values))


@pytest.mark.parametrize("uri", ["s3://bucket/mistral", "gs://bucket/mistral", "https://host.example/mistral.tar"])
def test_weights_from_elsewhere_are_downloaded_with_the_same_settings(uri: str) -> None:
    assert environment({"storage.uri": uri})["STORAGE_URI"] == uri
    assert "storageContainerName" in predictor({"storage.uri": uri})


def test_kserves_own_download_settings_can_be_kept() -> None:
    values = {"storage.initializer.create": False}
    assert "storageContainerName" not in predictor(values)
    assert not any(kind == "ClusterStorageContainer" for kind, _ in render(values))
    named = {"storage.initializer.create": False, "storage.initializer.name": "ours"}
    assert predictor(named)["storageContainerName"] == "ours"


def test_a_server_with_its_weights_never_asks_the_hub() -> None:
    assert environment()["HF_HUB_OFFLINE"] == "1"


def test_a_server_that_downloads_by_itself_has_the_token_and_the_room() -> None:
    values = {
        "storage.uri": "",
        "server.modelId": "a/b",
        "server.modelRevision": "main",
        "hfToken.secretName": "hf",
    }
    variables = environment(values)
    assert variables["MISTRAL_MODEL_ID"] == "a/b"
    assert variables["MISTRAL_MODEL_REVISION"] == "main"
    assert "STORAGE_URI" not in variables
    assert "HF_HUB_OFFLINE" not in variables
    assert "HF_TOKEN" in variables
    mounts = {m["name"]: m["mountPath"] for m in container(values)["volumeMounts"]}
    assert mounts["hub"] == variables["HF_HOME"]


def test_the_cache_is_filled_with_what_the_server_mounts() -> None:
    objects = render(scenario="pvc-cache")
    [claim] = [o for (kind, _), o in objects.items() if kind == "PersistentVolumeClaim"]
    [job] = [o for (kind, _), o in objects.items() if kind == "Job"]
    pod = job["spec"]["template"]["spec"]
    _script, uri, target, _kept = pod["containers"][0]["args"]
    directory = target.removeprefix("/cache/")
    assert environment(scenario="pvc-cache")["STORAGE_URI"] == f"pvc://{claim['metadata']['name']}/{directory}"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert uri == environment()["STORAGE_URI"]


def test_the_cache_is_filled_with_the_rights_and_at_the_place_that_the_download_needs() -> None:
    values = {
        "image.pullSecrets": ["regcred"],
        "storage.cache.nodeSelector": {"topology.kubernetes.io/zone": "eu-1a"},
        "storage.cache.tolerations": [{"key": "sku", "operator": "Exists"}],
    }
    [pod] = [o["spec"]["template"]["spec"] for (kind, _), o in render(values, "pvc-cache").items() if kind == "Job"]
    assert pod["serviceAccountName"] == "mistral-7b"
    assert pod["imagePullSecrets"] == [{"name": "regcred"}]
    assert pod["nodeSelector"] == {"topology.kubernetes.io/zone": "eu-1a"}
    assert pod["tolerations"] == [{"key": "sku", "operator": "Exists"}]
    [token] = [e for e in pod["containers"][0]["env"] if e["name"] == "HF_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN"}}


def test_no_mesh_keeps_the_cache_job_or_the_test_running() -> None:
    [job] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "Job"]
    for metadata in (job["spec"]["template"]["metadata"], helm_test_pod()["metadata"]):
        assert metadata["labels"]["sidecar.istio.io/inject"] == "false"
        assert metadata["annotations"]["linkerd.io/inject"] == "disabled"


def test_the_cache_survives_an_uninstall() -> None:
    [claim] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_another_model_gets_another_job_and_another_directory() -> None:
    other = {"storage.uri": "hf://a/b:c"}
    jobs = {key for key in render(scenario="pvc-cache") if key[0] == "Job"}
    assert jobs.isdisjoint(render(other, "pvc-cache"))
    mounted = environment(scenario="pvc-cache")["STORAGE_URI"]
    assert environment(other, "pvc-cache")["STORAGE_URI"] != mounted


# ---- Secrets ----


def test_an_existing_token_is_attached_to_the_service_account() -> None:
    objects = render({"hfToken.secretName": "hf", "serviceAccount.secrets": ["s3"]})
    assert objects[("ServiceAccount", "mistral-7b")]["secrets"] == [{"name": "hf"}, {"name": "s3"}]
    assert not any(kind == "Secret" for kind, _ in objects)


def test_a_token_in_the_values_becomes_a_secret() -> None:
    objects = render({"hfToken.token": "hf_x", "hfToken.secretName": ""})
    assert objects[("Secret", "mistral-7b-hf-token")]["stringData"] == {"HF_TOKEN": "hf_x"}
    assert objects[("ServiceAccount", "mistral-7b")]["secrets"] == [{"name": "mistral-7b-hf-token"}]


def test_api_keys_in_the_values_become_a_secret_with_one_key_a_line() -> None:
    secret = render({"apiKeys.keys": ["first-key", "second-key"]})[("Secret", "mistral-7b-api-keys")]
    assert secret["stringData"]["api-keys"] == "first-key\nsecond-key\n"


@pytest.mark.parametrize("values", [{"apiKeys.secretName": "keys"}, {"apiKeys.keys": ["a-long-key"]}])
def test_api_keys_are_mounted_so_that_a_rotation_arrives(values: dict[str, object]) -> None:
    [mount] = [m for m in container(values)["volumeMounts"] if m["name"] == "api-keys"]
    assert "subPath" not in mount
    assert environment(values)["MISTRAL_API_KEY_FILE"] == f"{mount['mountPath']}/api-keys"


def test_secrets_never_stand_in_the_inference_service() -> None:
    assert "hf_x" not in str(inference_service({"hfToken.token": "hf_x", "hfToken.secretName": ""}))
    assert "a-long-key" not in str(inference_service({"apiKeys.keys": ["a-long-key"]}))
