"""Queries the cluster for everything that the checks need, each query once.

A right that is missing becomes an `Answer` that names it, so that one refusal does not end the command. The dry runs
are requests to create, which the API server tries with every webhook and then forgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from mistral_cli.cluster import (
    CONFIG_MAP,
    INFERENCE_SERVICE,
    NODE,
    POD,
    QUOTA,
    SECRET,
    ClusterError,
    Conflict,
    Forbidden,
    Kind,
    NotFound,
    Rejected,
    Unreachable,
)  # fmt: skip
from mistral_cli.objects import Object, dig
from mistral_cli.preflight.observed import Answer, Observed
from mistral_cli.preflight.release import knative_service
from mistral_cli.preflight.release.manifests import Release
from mistral_cli.preflight.target import KNATIVE_NAMESPACE

KNATIVE_SERVICE = Kind("serving.knative.dev/v1", "services")
STORAGE_CONTAINER = Kind("serving.kserve.io/v1alpha1", "clusterstoragecontainers")
DEFINITION = Kind("apiextensions.k8s.io/v1", "customresourcedefinitions")
NAMESPACE = Kind("v1", "namespaces")
ACCOUNT = Kind("v1", "serviceaccounts")
CLAIM = Kind("v1", "persistentvolumeclaims")
STORAGE_CLASS = Kind("storage.k8s.io/v1", "storageclasses")
PROMETHEUS = Kind("monitoring.coreos.com/v1", "prometheuses")
CONFIGS = ("config-features", "config-defaults", "config-autoscaler", "config-deployment", "config-domain")
MONITORS = ("PodMonitor", "PrometheusRule")

T = TypeVar("T")


class Source(Protocol):
    """What the reader needs of a cluster."""

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object: ...
    def list(self, kind: Kind, namespace: str | None = None, **query: str) -> list[Object]: ...
    def read(self, path: str) -> Object: ...
    def create(self, kind: Kind, namespace: str | None, body: Object, *, dry_run: bool = False) -> Object: ...
    def replace(self, kind: Kind, namespace: str, name: str, body: Object, *, dry_run: bool = False) -> Object: ...


class Reader:
    """One cluster, asked for one release in one namespace."""

    def __init__(self, cluster: Source, namespace: str, release: Release) -> None:
        self._cluster, self._namespace, self._release = cluster, namespace, release

    def read(self) -> Observed:
        """Ask everything."""
        release, cluster = self._release, self._cluster
        service = self._get(INFERENCE_SERVICE, release.name)
        account = self._get(ACCOUNT, release.account)
        service_dry_run = self._dry_run_service(service)
        kinds = {version: self._kinds(version) for version in versions(release)}
        monitored = any(release.of_kind(kind) for kind in MONITORS)
        stored = release.claims() or release.of_kind("PersistentVolumeClaim")
        container = release.storage_container
        foreign = container and release.created("ClusterStorageContainer", container) is None
        return Observed(
            version=_ask(lambda: str(cluster.read("/version").get("gitVersion", ""))),
            namespace=_ask(lambda: cluster.get(NAMESPACE, None, self._namespace)),
            kinds=kinds,
            predictor_fields=_ask(self._predictor_fields),
            configs={name: self._config(name) for name in CONFIGS} if release.knative else {},
            service=service,
            service_dry_run=service_dry_run,
            pod_dry_run=self._dry_run_pod(service_dry_run, account),
            account=account,
            secrets={use.name: self._get(SECRET, use.name) for use in release.secrets(account.value)},
            storage_container=_ask(lambda: cluster.get(STORAGE_CONTAINER, None, container)) if foreign else Answer(),
            claims={name: self._get(CLAIM, name) for name in release.claims()},
            storage_classes=self._list(STORAGE_CLASS) if stored else Answer(()),
            nodes=self._list(NODE),
            pods=self._list(POD),
            quotas=self._list(QUOTA, self._namespace),
            prometheuses=self._list(PROMETHEUS) if monitored else Answer(()),
        )

    def _get(self, kind: Kind, name: str) -> Answer[Object]:
        return _ask(lambda: self._cluster.get(kind, self._namespace, name))

    def _list(self, kind: Kind, namespace: str | None = None) -> Answer[Sequence[Object]]:
        return _ask(lambda: self._cluster.list(kind, namespace))

    def _config(self, name: str) -> Answer[Object]:
        return _ask(lambda: self._cluster.get(CONFIG_MAP, KNATIVE_NAMESPACE, name))

    def _kinds(self, version: str) -> Answer[frozenset[str]]:
        """Ask for the kinds of an API version; every caller that is logged in may."""

        def kinds() -> frozenset[str]:
            listed = self._cluster.read(f"/apis/{version}").get("resources") or []
            return frozenset(str(each["kind"]) for each in listed)

        return _ask(kinds)

    def _predictor_fields(self) -> frozenset[str]:
        definition = self._cluster.get(DEFINITION, None, "inferenceservices.serving.kserve.io")
        group_version = INFERENCE_SERVICE.group_version.rpartition("/")[2]
        for version in dig(definition, "spec", "versions") or ():
            if version.get("name") == group_version and version.get("served"):
                schema = dig(version, "schema", "openAPIV3Schema", "properties", "spec", "properties", "predictor")
                return frozenset(dig(schema, "properties") or {})
        raise NotFound(f"inferenceservices.serving.kserve.io is not served as {group_version}")

    def _dry_run_service(self, existing: Answer[Object]) -> Answer[Object]:
        """Dry-run the InferenceService; KServe answers with its defaults filled in."""
        body = {**self._release.service}
        body["metadata"] = {**body["metadata"], "namespace": self._namespace}
        if existing.value is None:
            return _ask(lambda: self._cluster.create(INFERENCE_SERVICE, self._namespace, body, dry_run=True))
        metadata = existing.value["metadata"]
        body["metadata"]["resourceVersion"] = metadata["resourceVersion"]
        name = self._release.name
        return _ask(lambda: self._cluster.replace(INFERENCE_SERVICE, self._namespace, name, body, dry_run=True))

    def _dry_run_pod(self, tried: Answer[Object], account: Answer[Object]) -> Answer[Object]:
        """Dry-run what KServe makes of it; without KServe's answer, of the release as it is.

        A ServiceAccount that only the install creates is left out: the pod would be refused for it alone.
        """
        service = tried.value or self._release.service
        with_account = account.value is not None
        if not self._release.knative:
            pod = knative_service.pod(service, self._namespace, with_account=with_account)
            return _ask(lambda: self._cluster.create(POD, self._namespace, pod, dry_run=True))
        body = knative_service.knative_service(service, self._namespace, with_account=with_account)

        def attempt() -> Object:
            try:
                return self._cluster.create(KNATIVE_SERVICE, self._namespace, body, dry_run=True)
            except Conflict:  # the release runs already: a second name is tried in its stead
                other = {**body, "metadata": {**body["metadata"], "name": f"{body['metadata']['name']}-preflight"}}
                return self._cluster.create(KNATIVE_SERVICE, self._namespace, other, dry_run=True)

        return _ask(attempt)


def versions(release: Release) -> list[str]:
    """Return the API versions that belong to add-ons of Kubernetes."""
    found = {str(o["apiVersion"]) for o in release.objects}
    if release.knative:
        found.add(KNATIVE_SERVICE.group_version)
    if (release.service["metadata"].get("annotations") or {}).get("serving.kserve.io/autoscalerClass") == "keda":
        found.add("keda.sh/v1alpha1")
    return sorted(version for version in found if "." in version.partition("/")[0] and ".k8s.io" not in version)


def _ask(question: Callable[[], T]) -> Answer[T]:
    try:
        return Answer(question())
    except NotFound:
        # A 404 of a request to create speaks of the namespace or of the kind: the checks of those say so.
        return Answer(None)
    except Forbidden as error:
        # Only RBAC says which verb and resource it denies; Pod Security, limits and quotas answer 403 as well.
        sentence = str(error)
        return Answer(unknown=sentence) if _is_right(sentence) else Answer(refused=sentence)
    except (Rejected, Conflict) as error:
        return Answer(refused=str(error))
    except Unreachable as error:
        return Answer(refused=str(error)) if "failed calling webhook" in str(error) else Answer(unknown=str(error))
    except ClusterError as error:
        return Answer(unknown=str(error))


def _is_right(sentence: str) -> bool:
    return ("cannot" in sentence and "resource" in sentence) or "nauthorized" in sentence
