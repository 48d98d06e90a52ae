"""The relay: off by default, one replica with one volume, and no open door to a server that asks for keys."""

from __future__ import annotations

from typing import Any

import pytest

from charts.render_manifests import Object
from mistral_relay.settings import Settings
from tests.support.helm import NONE, Values, refusal, render

ENABLED: Values = {"relay.enabled": True}
KEYED: Values = {**ENABLED, "apiKeys.secretName": "keys", "relay.upstreamKeySecretName": "upstream"}


def relay(kind: str, values: Values = ENABLED) -> Object:
    return render(values)[(kind, "mistral-7b-relay")]


def pod(values: Values = ENABLED) -> dict[str, Any]:
    spec: dict[str, Any] = relay("Deployment", values)["spec"]["template"]["spec"]
    return spec


def environment(values: Values = ENABLED) -> dict[str, str]:
    [container] = pod(values)["containers"]
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_nothing_of_the_relay_is_rendered_by_default() -> None:
    assert not [name for _, name in render(NONE) if "relay" in name]


def test_one_process_owns_the_volume_and_the_volume_outlives_the_release() -> None:
    deployment = relay("Deployment")["spec"]
    claim = relay("PersistentVolumeClaim")
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "mistral-7b-relay"}} in pod()["volumes"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_the_service_finds_the_relay_and_not_the_model() -> None:
    labels = relay("Deployment")["spec"]["template"]["metadata"]["labels"]
    selector = relay("Service")["spec"]["selector"]
    assert selector.items() <= labels.items()
    assert selector["app.kubernetes.io/component"] == "relay"
    assert "serving.kserve.io/inferenceservice" not in labels


def test_the_pod_meets_the_restricted_standard_and_has_no_token() -> None:
    [container] = pod()["containers"]
    context = container["securityContext"]
    assert pod()["automountServiceAccountToken"] is False
    assert context["runAsNonRoot"] is context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert (context["capabilities"], context["seccompProfile"]) == ({"drop": ["ALL"]}, {"type": "RuntimeDefault"})
    assert container["command"] == ["python", "-m", "mistral_relay"]


@pytest.mark.parametrize(
    "values",
    [
        ENABLED,
        {
            **KEYED,
            "relay.webhookHosts": ["hooks.example.com", "a.example"],
            "relay.webhookSecretName": "hooks",
            "relay.concurrency": 4,
        },
    ],
)
def test_the_relay_itself_accepts_the_settings_it_is_given(values: Values) -> None:
    settings = Settings.from_environ(environment(values))
    assert settings.upstream_url == "http://mistral-7b-predictor.mistral.svc"
    assert settings.webhook_hosts == tuple(values.get("relay.webhookHosts", ()))
    assert settings.concurrency == values.get("relay.concurrency", 32)


def test_the_defaults_are_those_of_the_relay() -> None:
    assert Settings.from_environ(environment()) == Settings("http://mistral-7b-predictor.mistral.svc")


def test_each_secret_is_mounted_where_the_relay_looks_for_it() -> None:
    values = {**KEYED, "relay.webhookHosts": ["hooks.example.com"], "relay.webhookSecretName": "hooks"}
    [secrets] = [volume["projected"]["sources"] for volume in pod(values)["volumes"] if volume["name"] == "secrets"]
    mounted = {
        f"/etc/mistral-relay/{item['path']}": s["secret"]["name"] for s in secrets for item in s["secret"]["items"]
    }
    settings = Settings.from_environ(environment(values))
    assert mounted == {
        str(settings.api_key_file): "keys",
        str(settings.upstream_key_file): "upstream",
        str(settings.webhook_secret_file): "hooks",
    }


def test_callers_of_the_relay_may_have_keys_of_their_own() -> None:
    [secrets] = [v for v in pod({**KEYED, "relay.apiKeysSecretName": "callers"})["volumes"] if v["name"] == "secrets"]
    assert "callers" in str(secrets)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"relay.webhookHosts": ["hooks.example.com"]},
            "relay.webhookSecretName is not, but the relay must sign webhooks",
        ),
        (
            {"apiKeys.secretName": "keys"},
            "relay.upstreamKeySecretName is not set, so the server would refuse the relay",
        ),
        (
            {"server.apiKeyFile": "/etc/keys", "relay.upstreamKeySecretName": "upstream"},
            "would accept requests without a key. Set relay.apiKeysSecretName",
        ),
        ({"relay.webhookHosts": ["https://hooks.example.com"]}, "relay"),
        ({"relay.storage.size": "0Gi"}, "relay.storage.size 0Gi must be more than zero"),
    ],
)
def test_values_that_the_relay_could_not_work_with_are_refused(values: Values, sentence: str) -> None:
    assert sentence in refusal({**ENABLED, **values})


def test_a_limit_for_each_key_needs_keys() -> None:
    assert "server.maxRequestsPerKey limits the requests of an API key" in refusal({"server.maxRequestsPerKey": 4})
