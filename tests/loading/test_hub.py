"""The hub: what is asked of it, and every refusal in one sentence. Nothing here leaves this machine."""

import errno
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from model_server.errors import StartupError
from model_server.loading import hub


class Hub:
    """Stands for `snapshot_download`: remembers what it was asked, answers or raises what it was told."""

    def __init__(self, cache) -> None:
        self.cache = cache
        self.asked: list[dict] = []
        self.error: Exception | None = None
        self.missing_bytes = 0

    def __call__(self, model_id, **arguments):
        self.asked.append(arguments)
        if self.error is not None:
            raise self.error
        if arguments.get("dry_run"):
            return [SimpleNamespace(file_size=self.missing_bytes, will_download=True)]
        return str(self.cache / "snapshot")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return fake


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://hub.invalid"))


def test_weights_are_asked_for_once_and_without_code(fake_hub):
    assert hub.download("owner/name", "v1") == fake_hub.cache / "snapshot"
    asked = fake_hub.asked[-1]
    assert asked["revision"] == "v1"
    files = [
        "config.json",
        "model-00001-of-00003.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_other.py",
        "original/model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
    ]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            errors.GatedRepoError("x", response=response(403)),
            r"gated: accept its terms .* HF_TOKEN .*\(it is not set\)",
        ),
        (
            errors.RepositoryNotFoundError("x", response=response(401)),
            "knows no model owner/name: check --model_id",
        ),
        (errors.RevisionNotFoundError("x", response=response(404)), "no revision v1: check --model_revision"),
        (errors.HFValidationError("x"), "--model_id must be like owner/name"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached and owner/name is not in the cache"),
        (errors.HfHubHTTPError("x", response=response(401)), "refuses access to owner/name: check HF_TOKEN"),
        (errors.HfHubHTTPError("x", response=response(502)), "answered 502 for owner/name"),
        (OSError(errno.ENOSPC, "No space left on device"), "does not fit on the disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.*HF_HOME"),
        (httpx2.ConnectError("x"), "could not be downloaded .*check the network"),
    ],
)
def test_every_refusal_is_one_sentence(fake_hub, error, sentence):
    fake_hub.error = error
    with pytest.raises(StartupError, match=sentence) as caught:
        hub.download("owner/name", "v1")
    assert "\n" not in str(caught.value)


def test_token_that_is_set_is_not_said_to_be_missing(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fake_hub.error = errors.GatedRepoError("x", response=response(403))
    with pytest.raises(StartupError) as caught:
        hub.download("owner/name")
    assert "not set" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_files_larger_than_the_disk_are_refused_before_the_download(fake_hub):
    fake_hub.missing_bytes = 10**18
    with pytest.raises(StartupError, match=r"needs 1000000000\.0 GB and does not fit"):
        hub.download("owner/name")
    assert [asked["dry_run"] for asked in fake_hub.asked] == [True]


def test_port_that_nobody_listens_on_is_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StartupError, match=r"cannot be reached|check the network"):
        hub.download("owner/name")
