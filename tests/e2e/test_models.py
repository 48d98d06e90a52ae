"""Another revision of the model, or another model, while the one before starts or serves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.cluster import Release, wait_until
from tests.e2e.load import ask, failures, under_load

INITIALIZER = os.environ.get("E2E_INITIALIZER_IMAGE", "dev.local/storage-initializer:1")
MODEL, OTHER_MODEL = "hf://mistralai/Mistral-7B-Instruct-v0.3", "hf://mistralai/Mistral-7B-v0.1"
DOWNLOAD = {
    "hfToken.required": "false",
    "server.modelDir": "null",
    "storage.initializer.image": INITIALIZER,
    "storage.initializer.resources.requests.cpu": "50m",
    "storage.initializer.resources.requests.memory": "256Mi",
}
"""The model comes by `storage.uri` as on a GPU; the initializer copies the demo model whatever the address says."""


@pytest.fixture(scope="module")
def downloading(make_release: Callable[[str], Release]) -> Iterator[Release]:
    """A release whose first revision is still starting."""
    release = make_release("-models")
    release.install(settings={**DOWNLOAD, "storage.uri": f"{MODEL}:one"})
    wait_until(lambda: release.objects("pod") != [], "the first revision has a pod")
    wait_until(lambda: release.newest_revision != "", "KServe's status names the first revision")
    yield release
    release.uninstall()


def test_a_new_model_revision_is_served_though_the_one_before_never_became_ready(downloading: Release) -> None:
    first = downloading.newest_revision

    downloading.change({"storage.uri": f"{MODEL}:two"})

    wait_until(lambda: downloading.newest_revision != first, "there is a second revision")
    second = downloading.newest_revision
    wait_until(lambda: downloading.newest_ready_revision == second, "the second revision is ready")
    downloading.wait_for_traffic({second: 100})
    assert failures([ask(downloading.target)]) == []


def test_two_changes_of_the_model_revision_at_once_lose_no_request(downloading: Release) -> None:
    before = downloading.newest_ready_revision

    with under_load(downloading.target, clients=2) as answers:
        downloading.change({"storage.uri": f"{MODEL}:three"})
        wait_until(lambda: downloading.newest_revision != before, "there is a revision of the first change")
        starting = downloading.newest_revision
        downloading.change({"storage.uri": f"{MODEL}:four"})
        wait_until(lambda: downloading.newest_revision != starting, "there is a revision of the second change")
        newest = downloading.newest_revision
        downloading.wait_for_traffic({newest: 100})
        downloading.wait_until_stopped(before)

    assert failures(answers) == []


def test_the_old_model_still_starts_pods_beside_a_canary_of_another_model(downloading: Release) -> None:
    old = downloading.newest_ready_revision
    downloading.change({"storage.uri": f"{OTHER_MODEL}:one", "rollout.canaryTrafficPercent": "50"})
    canary = downloading.wait_for_new_revision(old)
    downloading.wait_for_traffic({old: 50, canary: 50})
    old_pods = f"serving.knative.dev/revision={old}"
    deleted = {pod["metadata"]["name"] for pod in downloading.objects("pod", old_pods)}

    with under_load(downloading.target, clients=2) as answers:
        downloading.kubectl("delete", "pod", "--selector", old_pods)
        wait_until(
            lambda: any(
                pod["metadata"]["name"] not in deleted and pod["status"]["containerStatuses"][0]["ready"]
                for pod in downloading.objects("pod", old_pods)
                if pod["status"].get("containerStatuses")
            ),
            f"{old} has a new pod that is ready",
        )

    assert failures(answers) == []
