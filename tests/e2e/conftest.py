"""The cluster under test, from the environment: README.md beside this file names the variables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Release

NO_CLUSTER = "E2E_CONTEXT does not name the kube context of a cluster with KServe and Knative (tests/e2e/README.md)"

DEMO = "dev.local/mistral-7b-kserve:demo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of them, and give each the time that pods take to come and go."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def make_release() -> Iterator[Callable[[str], Release]]:
    """A factory of releases that are not installed yet, by the end of their namespace's name; all are removed."""
    if not (context := os.environ.get("E2E_CONTEXT")):
        pytest.skip(NO_CLUSTER)
    made = []

    def make(suffix: str = "") -> Release:
        images = os.environ.get("E2E_IMAGE", DEMO), os.environ.get("E2E_NEXT_IMAGE", f"{DEMO}-next")
        namespace = os.environ.get("E2E_NAMESPACE", "mistral-e2e") + suffix
        gateway, values = os.environ.get("E2E_GATEWAY", ""), os.environ.get("E2E_VALUES", "")
        made.append(Release(context, namespace, images, gateway, values))
        return made[-1]

    yield make
    if not os.environ.get("E2E_KEEP"):
        for release in made:
            release.uninstall()


@pytest.fixture(scope="session")
def release(make_release: Callable[[str], Release]) -> Release:
    """The chart's CPU scenario, installed and Ready."""
    release = make_release("")
    release.install()
    release.wait_until_ready()
    return release
