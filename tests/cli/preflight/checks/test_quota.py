"""A quota has room for the pods of a release."""

from __future__ import annotations

import pytest

from mistral_cli.preflight.checks import quota
from mistral_cli.preflight.checks.finding import State
from mistral_cli.preflight.observed import Answer, Observed
from tests.support.preflight_checks import TARGET, release

pytestmark = pytest.mark.chart


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
    observed = Observed(quotas=Answer([limit]), pods=Answer([pod] * own_pods))
    (finding,) = quota.check(release(), observed, TARGET)
    assert (finding.state, part in finding.what) == (state, True)


def test_a_release_with_a_canary_needs_room_for_three_pods() -> None:
    limit = {"metadata": {"name": "q"}, "status": {"hard": {"pods": "2"}, "used": {"pods": "0"}}}
    (finding,) = quota.check(release("canary"), Observed(quotas=Answer([limit])), TARGET)
    assert finding.state == State.MISSING
