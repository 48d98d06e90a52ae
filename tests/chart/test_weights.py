"""Where the weights come from, and the secrets beside them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.helm import container, environment, inference_service, predictor, render


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


def test_the_download_settings_take_over_nobody_elses_downloads() -> None:
    [storage] = [o for (kind, _), o in render().items() if kind == "ClusterStorageContainer"]
    assert storage["spec"]["supportedUriFormats"] == [{"prefix": environment()["STORAGE_URI"]}]


@pytest.mark.parametrize("uri", ["pvc://claim/mistral", "oci://registry.example/mistral:1"])
def test_weights_that_are_mounted_need_no_download_settings(uri: str) -> None:
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
    _script, uri, directory = pod["containers"][0]["args"]
    assert environment(scenario="pvc-cache")["STORAGE_URI"] == f"pvc://{claim['metadata']['name']}/{directory}"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert uri == environment()["STORAGE_URI"]


def test_the_cache_survives_an_uninstall() -> None:
    [claim] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_another_model_gets_another_job_and_another_directory() -> None:
    other = {"storage.uri": "hf://a/b:c"}
    jobs = {key for key in render(scenario="pvc-cache") if key[0] == "Job"}
    assert jobs.isdisjoint(render(other, "pvc-cache"))
    mounted = environment(scenario="pvc-cache")["STORAGE_URI"]
    assert environment(other, "pvc-cache")["STORAGE_URI"] != mounted


def fill(tmp_path: Path, initializer: str) -> subprocess.CompletedProcess[str]:
    """Run the Job's own script against a directory, with a download of our making."""
    [job] = [o for (kind, _), o in render(scenario="pvc-cache").items() if kind == "Job"]
    script, uri, _directory = job["spec"]["template"]["spec"]["containers"][0]["args"]
    download = tmp_path / "initializer"
    download.write_text(f"#!/bin/sh\n{initializer}\n")
    download.chmod(0o755)
    script = script.replace("/storage-initializer/scripts/initializer-entrypoint", str(download))
    (tmp_path / "cache").mkdir(exist_ok=True)
    script = script.replace("/cache", str(tmp_path / "cache"))
    return subprocess.run(["sh", "-euc", script, uri, "model"], capture_output=True, text=True)


def test_the_cache_shows_the_weights_only_when_all_are_there(tmp_path: Path) -> None:
    model = tmp_path / "cache" / "model"
    model.mkdir(parents=True)  # the kubelet makes it for a replica that started first
    assert fill(tmp_path, 'mkdir -p "$2"; touch "$2/config.json"; exit 1').returncode != 0
    assert not list(model.iterdir())
    assert fill(tmp_path, 'mkdir "$2"; touch "$2/config.json" "$2/model.safetensors"').returncode == 0
    assert {p.name for p in model.iterdir()} == {"config.json", "model.safetensors"}


def test_a_full_cache_is_not_filled_again(tmp_path: Path) -> None:
    fill(tmp_path, 'mkdir "$2"; touch "$2/config.json"')
    assert fill(tmp_path, "exit 1").returncode == 0


# ---- Secrets ----


def test_an_existing_token_is_attached_to_the_service_account() -> None:
    objects = render({"hfToken.secretName": "hf", "serviceAccount.secrets": ["s3"]})
    assert objects[("ServiceAccount", "mistral-7b")]["secrets"] == [{"name": "hf"}, {"name": "s3"}]
    assert not any(kind == "Secret" for kind, _ in objects)


def test_a_token_in_the_values_becomes_a_secret() -> None:
    objects = render({"hfToken.token": "hf_x"})
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
    assert "hf_x" not in str(inference_service({"hfToken.token": "hf_x", "apiKeys.keys": ["a-long-key"]}))
    assert "a-long-key" not in str(inference_service({"apiKeys.keys": ["a-long-key"]}))
