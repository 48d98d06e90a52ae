"""What an install may add: a payload log, labels, a disruption budget, volumes, a spread over nodes."""

from __future__ import annotations

from tests.support.helm import container, predictor, render


def test_the_payload_log_is_off_until_somebody_says_where_it_goes() -> None:
    assert "logger" not in predictor()
    logger = {"mode": "request", "url": "http://broker.events/default"}
    assert predictor({"logger": {**logger, "enabled": True}})["logger"] == logger


def test_labels_reach_the_pods_or_every_object() -> None:
    assert predictor({"podLabels": {"team": "nlp"}})["labels"] == {"team": "nlp"}
    for o in render({"commonLabels": {"cost-center": "42"}}, "production").values():
        assert o["metadata"]["labels"]["cost-center"] == "42"


def test_a_disruption_budget_covers_all_revisions() -> None:
    values = {"podDisruptionBudget.enabled": True, "scaling.minReplicas": 2}
    budget = render(values)[("PodDisruptionBudget", "mistral-7b")]["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "mistral-7b"}


def test_extra_volumes_are_read_only_where_knative_wants_that() -> None:
    values = {
        "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}, {"name": "scratch", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}, {"name": "scratch", "mountPath": "/scratch"}],
    }
    mounts = {m["name"]: m.get("readOnly") for m in container(values)["volumeMounts"]}
    assert (mounts["ca"], mounts["scratch"]) == (True, False)
    assert {"name": "ca", "configMap": {"name": "ca"}} in predictor(values)["volumes"]


def test_a_spread_without_a_selector_counts_the_releases_own_pods() -> None:
    spread = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    flags = [f"kubernetes.podspec-{f}" for f in ("nodeselector", "tolerations", "topologyspreadconstraints")]
    values = {"topologySpreadConstraints": [spread], "cluster.knativeFlags": flags}
    [rendered_spread] = predictor(values)["topologySpreadConstraints"]
    pods = {"matchLabels": {"serving.kserve.io/inferenceservice": "mistral-7b"}}
    assert rendered_spread == {**spread, "labelSelector": pods}


def test_a_size_in_plain_bytes_stays_a_whole_number() -> None:
    """A number of a values file is a float to Helm, which prints 1e+09; KServe's CRD takes no float."""
    [tmp] = [volume for volume in predictor({"tmpSize": 1073741824})["volumes"] if volume["name"] == "tmp"]
    assert tmp["emptyDir"]["sizeLimit"] == "1073741824"
    values = {"storage.cache.size": 42949672960}
    [claim] = [o for (kind, _), o in render(values, "pvc-cache").items() if kind == "PersistentVolumeClaim"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "42949672960"
