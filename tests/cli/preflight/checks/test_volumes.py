"""A claim is bound, or a StorageClass can bind it."""

from __future__ import annotations

import pytest

from mistral_cli.preflight.checks import volumes
from mistral_cli.preflight.checks.finding import State
from mistral_cli.preflight.observed import Answer, Observed
from tests.support.cluster_api import admission as cluster
from tests.support.preflight_checks import TARGET, release

pytestmark = pytest.mark.chart


@pytest.mark.parametrize(
    ("provisioner", "state"),
    [("efs.csi.aws.com", State.OK), ("ebs.csi.aws.com", State.MISSING), ("acme.example.com", State.UNKNOWN)],
)
def test_the_provisioner_tells_whether_many_nodes_can_mount(provisioner: str, state: State) -> None:
    storage = {**cluster.storage_class(provisioner)}
    storage["metadata"]["name"] = "standard"
    (finding,) = volumes.check(release("pvc-cache"), Observed(storage_classes=Answer([storage])), TARGET)
    assert finding.state == state


def test_without_a_default_storage_class_the_claim_would_stay_pending() -> None:
    (finding,) = volumes.check(release("pvc-cache"), Observed(), TARGET)
    assert finding.state == State.MISSING
