"""Checks are functions of objects: tables of what a cluster says and the state that follows."""

from __future__ import annotations

from typing import Any

import pytest

from charts.render_manifests import render
from mistral_cli.preflight import admission, gpu, image, monitoring, quota, volumes
from mistral_cli.preflight.answer import Answer, Object, Outside, Seen
from mistral_cli.preflight.finding import Finding, State
from mistral_cli.preflight.release import Release, parse
from mistral_cli.preflight.where import Where
from tests.support.cluster_api import admission as cluster

pytestmark = pytest.mark.chart
WHERE = Where("ctx", "mistral", "charts/mistral-7b", ("values.yaml",))


def release(scenario: str = "gfd") -> Release:
    return parse(render(scenario))


def named(node: Object) -> Object:
    return {**node, "metadata": {**node["metadata"], "name": "gpu-1"}}


def one(found: Any, check: str) -> Finding:
    (finding,) = [each for each in found if each.check == check]
    return finding


DENIED = 'admission webhook "validation.webhook.serving.knative.dev" denied the request: validation'
TRIED = f'{DENIED} callback failed: dry run failed with pods "d" is forbidden:'
REFUSALS = {
    # Sentences of Kubernetes 1.34 with Knative 1.23 and KServe 0.20, as a cluster said them.
    f"{DENIED} failed: must not set the field(s): spec.template.spec.nodeSelector": "patch configmap config-features",
    f"{DENIED} failed: expected 0 <= 3300 <= 1800: spec.template.spec.timeoutSeconds": "configmap config-defaults",
    f"{TRIED} exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0": "patch resourcequota none",
    f'{TRIED} violates PodSecurity "restricted:latest": runAsNonRoot != true': "enforce=baseline",
    f"{TRIED} maximum cpu usage per Container is 500m, but limit is 2: spec.template": "edit limitrange",
    f'{TRIED} Invalid value: "3": must be less than or equal to cpu limit of 1': "resources.limits.cpu=3",
    f"{TRIED} no PriorityClass with name nope was found: spec.template": "create priorityclass nope",
    'strict decoding error: unknown field "spec.predictor.storageContainerName"': "kserve.yaml",
    'failed calling webhook "inferenceservice.kserve-webhook-server.defaulter"': "-n kserve rollout status",
    'failed calling webhook "webhook.serving.knative.dev"': "-n knative-serving rollout status deployment/webhook",
}


@pytest.mark.parametrize(("sentence", "command"), REFUSALS.items())
def test_each_refusal_of_a_dry_run_has_the_command_that_mends_it(sentence: str, command: str) -> None:
    seen = Seen(tried_service=Answer({}), tried_pod=Answer(refused=sentence))
    finding = one(admission.check(release(), seen, WHERE), "Knative Service dry run")
    assert finding.state == State.MISSING
    assert command in finding.command


def test_two_objections_in_one_refusal_give_both_commands() -> None:
    said = f"{DENIED} failed: expected 0 <= 3300 <= 1800: timeoutSeconds must not set the field(s): nodeSelector"
    seen = Seen(tried_service=Answer({}), tried_pod=Answer(refused=said))
    command = one(admission.check(release(), seen, WHERE), "Knative Service dry run").command
    assert "config-features" in command
    assert "config-defaults" in command


@pytest.mark.parametrize(
    ("hard", "used", "own_pods", "state", "part"),
    [
        ("1", "0", 0, State.MISSING, "room for 2 pods"),
        ("2", "0", 0, State.OK, "room for one more pod"),
        ("3", "0", 0, State.OK, "what the release asks"),
        ("2", "1", 1, State.OK, "room for one more pod"),
        ("2", "2", 1, State.MISSING, "room for 2 pods"),
    ],
)
def test_the_quota_needs_room_for_the_pod_and_for_the_one_that_is_tried(
    hard: str, used: str, own_pods: int, state: State, part: str
) -> None:
    limit = {"metadata": {"name": "q"}, "status": {"hard": {"pods": hard}, "used": {"pods": used}}}
    labels = {"serving.kserve.io/inferenceservice": "mistral-7b"}
    pod = {"metadata": {"namespace": "mistral", "labels": labels}, "status": {"phase": "Running"}}
    seen = Seen(quotas=Answer([limit]), pods=Answer([pod] * own_pods))
    (finding,) = quota.check(release(), seen, WHERE)
    assert (finding.state, part in finding.what) == (state, True)


def test_a_release_with_a_canary_needs_room_for_three_pods() -> None:
    limit = {"metadata": {"name": "q"}, "status": {"hard": {"pods": "2"}, "used": {"pods": "0"}}}
    (finding,) = quota.check(release("canary"), Seen(quotas=Answer([limit])), WHERE)
    assert finding.state == State.MISSING


def test_the_releases_own_pod_does_not_count_against_its_gpu() -> None:
    own = cluster.gpu_pod("mistral")
    own["metadata"]["labels"] = {"serving.kserve.io/inferenceservice": "mistral-7b"}
    nodes = [named(cluster.node(None, **{"nvidia.com/gpu": "1"}))]
    finding = one(gpu.check(release(), Seen(nodes=Answer(nodes), pods=Answer([own])), WHERE), "GPU")
    assert finding.state == State.OK
    assert "--strategy swap" in finding.what


def test_a_full_group_that_may_grow_cannot_be_judged() -> None:
    nodes = [named(cluster.node({"karpenter.sh/nodepool": "gpu"}, **{"nvidia.com/gpu": "1"}))]
    seen = Seen(nodes=Answer(nodes), pods=Answer([cluster.gpu_pod()]))
    assert one(gpu.check(release(), seen, WHERE), "GPU").state == State.UNKNOWN


def test_a_label_that_an_autoscaler_knows_cannot_be_judged_without_a_node() -> None:
    nodes = [{"metadata": {"name": "cpu-1"}, "status": {"allocatable": {"cpu": "4"}}}]
    finding = one(gpu.check(release("karpenter"), Seen(nodes=Answer(nodes)), WHERE), "Nodes")
    assert finding.state == State.UNKNOWN


def test_a_release_without_a_gpu_asks_for_no_driver() -> None:
    nodes = [{"metadata": {"name": "n"}, "status": {"allocatable": {"cpu": "4", "memory": "8Gi",
                                                                    "ephemeral-storage": "50Gi"}}}]  # fmt: skip
    found = list(gpu.check(release("minimal-cpu"), Seen(nodes=Answer(nodes)), WHERE))
    assert [finding.check for finding in found] == ["Nodes"]


@pytest.mark.parametrize(
    ("provisioner", "state"),
    [("efs.csi.aws.com", State.OK), ("ebs.csi.aws.com", State.MISSING), ("acme.example.com", State.UNKNOWN)],
)
def test_the_provisioner_tells_whether_many_nodes_can_mount(provisioner: str, state: State) -> None:
    storage = {**cluster.storage_class(provisioner)}
    storage["metadata"]["name"] = "standard"
    (finding,) = volumes.check(release("pvc-cache"), Seen(storage_classes=Answer([storage])), WHERE)
    assert finding.state == state


def test_without_a_default_storage_class_the_claim_would_stay_pending() -> None:
    (finding,) = volumes.check(release("pvc-cache"), Seen(), WHERE)
    assert finding.state == State.MISSING


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
    ],
)
def test_a_label_selector_is_applied_as_kubernetes_does(selector: Object, selected: bool) -> None:
    assert monitoring.matches(selector, {"a": "1"}) is selected


@pytest.mark.parametrize(
    ("images", "state"),
    [
        ([{"names": ["dev.local/mistral-7b-kserve:demo"]}], State.OK),
        ([{"names": ["dev.local/other:1"]}], State.MISSING),
        ([{"names": [f"dev.local/other:{number}"]} for number in range(50)], State.UNKNOWN),
    ],
)
def test_an_image_that_is_never_pulled_must_be_on_a_node(images: list[Object], state: State) -> None:
    nodes = [{"metadata": {"name": "n"}, "status": {"images": images}}]
    (finding,) = image.check(release("minimal-cpu"), Seen(nodes=Answer(nodes)), Outside(), WHERE)
    assert finding.state == state
