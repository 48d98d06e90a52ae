"""Each obstacle alone in a cluster that lacks nothing else: preflight finds it and prints the command that fixes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cluster_api import admission as cluster
from tests.support.cluster_api.admission import CONFIGS, NAMESPACE, NODE, SECRET
from tests.support.cluster_api.api import Fault
from tests.support.preflight_runs import Site, of_state, site


def nothing(site: Site) -> None:
    pass


@dataclass
class Obstacle:
    """Something to plant, and what is expected of the report."""

    name: str
    check: str
    command: str
    """A part of the command that fixes it."""
    plant: Callable[[Site], object] = nothing
    sets: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Other checks that see it too."""


def features_off(site: Site) -> None:
    site.store.objects[f"{CONFIGS}/config-features"]["data"] = {}


def no_kserve(site: Site) -> None:
    for key in [key for key in site.store.objects if "serving.kserve.io" in key]:
        del site.store.objects[key]


def old_definition(site: Site) -> None:
    schema = site.store.objects[cluster.DEFINITION]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    del schema["properties"]["spec"]["properties"]["predictor"]["properties"]["storageContainerName"]


def narrow_storage_container(site: Site) -> None:
    site.store.put(f"{cluster.STORAGE_CONTAINERS}/shared", {"spec": {"supportedUriFormats": [{"prefix": "s3://"}]}})


def webhook_down(site: Site) -> None:
    said = 'failed calling webhook "inferenceservice.kserve-webhook-server.defaulter": no endpoints available'
    site.store.faults.append(Fault("PUT", "inferenceservices", 500, f"Internal error occurred: {said}", times=9))


def no_token_key(site: Site) -> None:
    site.store.objects[SECRET]["data"] = {"token": "dG9rZW4="}


def all_gpus_taken(site: Site) -> None:
    for number in (1, 2):
        site.store.put(f"/api/v1/namespaces/other/pods/p{number}", cluster.gpu_pod())


def image_for_arm(site: Site) -> None:
    site.artifacts.platforms = ("linux/arm64",)


def no_image(site: Site) -> None:
    site.artifacts.has_image = False


def private_registry(site: Site) -> None:
    site.artifacts.private = True


def terms_not_accepted(site: Site) -> None:
    site.artifacts.repository_status = 403


def picky_prometheus(site: Site) -> None:
    selector = {"matchLabels": {"release": "kube"}}
    site.store.objects[cluster.PROMETHEUS]["spec"]["podMonitorSelector"] = selector


def no_scale_to_zero(site: Site) -> None:
    site.store.objects[f"{CONFIGS}/config-autoscaler"]["data"] = {"enable-scale-to-zero": "false"}


FOREIGN_ACCOUNT = (
    "serviceAccount.create=false", "serviceAccount.name=loader", "hfToken.secretName=", "hfToken.required=false",
)  # fmt: skip
FOREIGN_CONTAINER = ("storage.initializer.create=false", "storage.initializer.name=shared")
SLOW_START = ("scaling.coldStartSeconds=900", "cluster.maxRevisionTimeoutSeconds=1800")
OBSTACLES = [
    Obstacle("flags are off", "config-features", "patch configmap config-features", features_off,
             also=("Knative Service dry run",)),
    Obstacle("requests may take longer than Knative allows", "config-defaults",
             '"max-revision-timeout-seconds": "1200"', sets=SLOW_START, also=("Knative Service dry run",)),
    Obstacle("scale to zero is off", "config-autoscaler", '"enable-scale-to-zero": "true"', no_scale_to_zero),
    Obstacle("KServe is not installed", "KServe v1beta1", "kserve.yaml", no_kserve, also=("KServe v1alpha1",)),
    Obstacle("KServe's schema is too old", "KServe fields", "kserve.yaml", old_definition,
             also=("InferenceService dry run",)),
    Obstacle("KServe's webhook is down", "InferenceService dry run", "rollout status", webhook_down),
    Obstacle("the namespace is missing", "Namespace", f"create namespace {NAMESPACE}",
             lambda s: s.store.objects.pop(f"/api/v1/namespaces/{NAMESPACE}")),
    Obstacle("the token's Secret is missing", "Secret hf-token",
             'create secret generic hf-token --from-literal=HF_TOKEN="$HF_TOKEN"',
             lambda s: s.store.objects.pop(SECRET)),
    Obstacle("the Secret has another key", "Secret hf-token", '--from-literal=HF_TOKEN="$HF_TOKEN" --dry-run=client',
             no_token_key),
    Obstacle("the ServiceAccount is missing", "ServiceAccount", "create serviceaccount loader",
             sets=FOREIGN_ACCOUNT),
    Obstacle("the storage container is for another address", "ClusterStorageContainer",
             "patch clusterstoragecontainer shared", narrow_storage_container, FOREIGN_CONTAINER),
    Obstacle("the storage container is missing", "ClusterStorageContainer", "storage.initializer.create=true",
             sets=FOREIGN_CONTAINER),
    Obstacle("the token does not open the repository", "Model repository", "create secret generic hf-token",
             terms_not_accepted),
    Obstacle("the image is not in its registry", "Image", "docker buildx build --platform linux/amd64", no_image),
    Obstacle("the image is built for another platform", "Image", "docker buildx build --platform linux/amd64",
             image_for_arm),
    Obstacle("the image is a tag in a private registry", "Image", 'image.digest="$(docker buildx imagetools inspect',
             private_registry, ("image.digest=", "image.tag=v1")),
    Obstacle("no node has a GPU", "Nodes", "gpu-operator",
             lambda s: s.store.put(NODE, {"metadata": {}, "status": {"allocatable": {"cpu": "16"}}})),
    Obstacle("the GPU is of another kind", "Nodes", 'nodeSelector={"nvidia.com/gpu.product": "NVIDIA-L4"}',
             lambda s: s.store.put(NODE, cluster.node({"nvidia.com/gpu.product": "NVIDIA-L4"}))),
    Obstacle("the device plugin is missing", "Nodes", "gpu-operator",
             lambda s: s.store.put(NODE, cluster.node(None, **{"nvidia.com/gpu": "0"}))),
    Obstacle("the node is too small", "Nodes", "resources.requests.memory=8Gi",
             lambda s: s.store.put(NODE, cluster.node(memory="8Gi"))),
    Obstacle("the node's taint is not tolerated", "Nodes", '"key": "team"',
             lambda s: s.store.objects[NODE]["spec"]["taints"].append({"key": "team", "effect": "NoSchedule"})),
    Obstacle("every GPU is taken", "GPU", "describe nodes gpu-1", all_gpus_taken),
    Obstacle("the driver is too old", "GPU driver", "patch clusterpolicy",
             lambda s: s.store.put(NODE, cluster.node({"nvidia.com/cuda.driver-version.major": "535"}))),
    Obstacle("the quota has room for one pod", "ResourceQuota", '"requests.nvidia.com/gpu": "3"',
             lambda s: s.store.put(cluster.QUOTA, cluster.quota(**{"requests.nvidia.com/gpu": "1"}))),
    Obstacle("the storage class makes disks for one node", "Volume mistral-7b-weights", "storage.cache.accessModes",
             lambda s: s.store.put(cluster.CLASS, cluster.storage_class("ebs.csi.aws.com")),
             ("storage.cache.enabled=true",)),
    Obstacle("Prometheus selects other labels", "PodMonitor", "monitoring.podMonitor.labels.release=kube",
             picky_prometheus),
    Obstacle("the Prometheus operator is missing", "The Prometheus operator v1", "monitoring.podMonitor.enabled=false",
             lambda s: s.store.objects.pop("/apis/monitoring.coreos.com/v1")),
]  # fmt: skip


@pytest.mark.chart
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.name)
def test_an_obstacle_is_found_and_its_command_is_printed(obstacle: Obstacle, tmp_path: Path) -> None:
    with site(tmp_path) as at:
        obstacle.plant(at)
        code, found = at.findings(*(word for each in obstacle.sets for word in ("--set", each)))
    lacking = of_state(found, "missing")
    assert set(lacking) == {obstacle.check, *obstacle.also}
    assert obstacle.command in lacking[obstacle.check]["command"].replace("'", "").replace('\\"', '"')
    assert code == 1


@pytest.mark.chart
def test_a_first_install_is_tried_by_creating(tmp_path: Path) -> None:
    with site(tmp_path) as at:
        del at.store.objects[cluster.SERVICE]
        _, found = at.findings()
        tried = [path.rpartition("/")[2] for method, path, _ in at.store.asked if method == "POST"]
    assert not of_state(found, "missing")
    assert tried == ["inferenceservices", "services"]
