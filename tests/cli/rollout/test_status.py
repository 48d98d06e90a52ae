"""Objects in, one phase and one sentence out: every state that a cluster was seen in."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from mistral_cli.rollout.state.observed import Observed
from mistral_cli.rollout.state.status import Phase, compute, seconds
from tests.support.cluster_api.objects import (
    NEW,
    NOW,
    OLD,
    R1,
    R2,
    R3,
    container,
    event,
    observed,
    pod,
    revision,
    service,
    stamp,
)  # fmt: skip

CRASHED = {"exitCode": 1, "reason": "Error", "message": "loading\nValueError: bad weights"}
NOT_FOUND = 'failed to pull and unpack image "x": registry.example.com/x: not found'
QUOTA = "admission webhook denied the request: dry run failed with pods is forbidden: exceeded quota: gpu"

BOTH = [revision(R1, OLD), revision(R2, NEW)]


def waiting(reason: str, message: str = "", **container_status: Any) -> list[dict[str, Any]]:
    """Return the newest revision's pod, whose server waits for this reason."""
    return [pod(R2, containers=[container(waiting={"reason": reason, "message": message}, **container_status)])]


STATES: dict[str, tuple[Observed, Phase, str]] = {
    "one revision has everything": (
        observed(service(OLD, None, created=R1), revisions=[revision(R1, OLD)]), Phase.STABLE, OLD,
    ),
    "the spec was patched and KServe has not acted": (
        observed(service(created=R1), revisions=[revision(R1, OLD)]), Phase.PENDING, NEW,
    ),
    "no revision was ever ready": (
        observed(service(created=R1, ready="", rolled_out="", traffic={}), revisions=[]), Phase.PENDING, "no version",
    ),
    "no pod yet": (observed(), Phase.PENDING, "no pod yet"),
    "no free GPU": (observed(pods=[pod(R2, scheduled_ago=42)]), Phase.SCHEDULING, "Insufficient nvidia.com/gpu"),
    "the image is being pulled": (
        observed(pods=waiting("ContainerCreating")),
        Phase.PULLING, "ContainerCreating",
    ),
    "the weights are being downloaded": (
        observed(
            pods=[pod(R2, inits=[container("storage-initializer", running={})])],
            log_tails={f"{R2}-deployment-6b-x": "Fetching 12 files:  33%|###  | 4/12"},
        ),
        Phase.DOWNLOADING, "(33 %)",
    ),
    "the model is being loaded": (
        observed(
            pods=[pod(R2, containers=[container(running={})])],
            log_tails={f"{R2}-deployment-6b-x": "reading weights: 7.2 GB of 14.5 GB (49%), 12 s"},
        ),
        Phase.LOADING, "7.2 GB of 14.5 GB",
    ),
    "one crash may be chance": (
        observed(pods=[pod(R2, containers=[container(restarts=1, ended=CRASHED, running={})])]), Phase.LOADING, "loads",
    ),
    "a crash loop": (
        observed(pods=waiting("CrashLoopBackOff", restarts=2, ended=CRASHED)),
        Phase.FAILED, "2 times, last with exit code 1 (Error): ValueError: bad weights",
    ),
    "the image does not exist": (
        observed(pods=waiting("ErrImagePull", NOT_FOUND)),
        Phase.FAILED, "cannot be pulled",
    ),
    "the image does not exist, and only the event says so": (
        observed(
            pods=waiting("ImagePullBackOff", "Back-off"),
            events=[event("Pod", f"{R2}-deployment-6b-x", "Failed", NOT_FOUND)],
        ),
        Phase.FAILED, "not found",
    ),
    "a registry that timed out may answer next time": (
        observed(pods=waiting("ErrImagePull", "pull: i/o timeout")),
        Phase.PULLING, "ErrImagePull",
    ),
    "the Secret with the token is missing": (
        observed(
            events=[event("ReplicaSet", f"{R2}-deployment-6b", "FailedCreate", 'secrets "hf-token" not found')]
        ),
        Phase.FAILED, 'secrets "hf-token" not found',
    ),
    "a service at zero whose last pod was refused": (
        observed(
            service(OLD, None, created=R1), revisions=[revision(R1, OLD)],
            events=[event("ReplicaSet", f"{R1}-deployment-6b", "FailedCreate", "pods is forbidden: exceeded quota: q")],
        ),
        Phase.STABLE, "has no pod: ",
    ),
    "a service at zero whose pods were created after a refusal": (
        observed(
            service(OLD, None, created=R1), revisions=[revision(R1, OLD)],
            events=[
                event("ReplicaSet", f"{R1}-deployment-6b", "FailedCreate", "exceeded quota: q", seconds_ago=60),
                event("ReplicaSet", f"{R1}-deployment-6b", "SuccessfulCreate", "Created pod", seconds_ago=30),
            ],
        ),
        Phase.STABLE, f"runs {OLD}",
    ),
    "a quota refused a change that another change has replaced": (
        observed(
            service(created=R1, managedFields=[{"manager": "helm", "time": stamp(60), "fieldsV1": {"f:spec": {}}}]),
            revisions=[revision(R1, OLD)],
            events=[event("InferenceService", "mistral-7b", "InternalError", QUOTA, seconds_ago=90)],
        ),
        Phase.PENDING, "no version",
    ),
    "a quota refused a change before the newest revision was created": (
        observed(
            pods=waiting("ContainerCreating"),
            events=[event("InferenceService", "mistral-7b", "InternalError", QUOTA, seconds_ago=400)],
        ),
        Phase.PULLING, "ContainerCreating",
    ),
    "a quota refuses a change that helm made": (
        observed(
            service(created=R1, managedFields=[{"manager": "helm", "time": stamp(60), "fieldsV1": {"f:spec": {}}}]),
            revisions=[revision(R1, OLD)],
            events=[event("InferenceService", "mistral-7b", "InternalError", QUOTA, seconds_ago=30)],
        ),
        Phase.FAILED, "exceeded quota",
    ),
    "a Secret that is mounted is missing": (
        observed(
            pods=waiting("ContainerCreating"),
            events=[event("Pod", f"{R2}-deployment-6b-x", "FailedMount", 'MountVolume.SetUp: secret "keys" not found')],
        ),
        Phase.FAILED, 'secret "keys" not found',
    ),
    "a Secret was missing until the container could start": (
        observed(
            pods=[pod(R2, containers=[container(running={})])],
            events=[event("Pod", f"{R2}-deployment-6b-x", "FailedMount", 'MountVolume.SetUp: secret "keys" not found')],
        ),
        Phase.LOADING, "loads",
    ),
    "a ConfigMap key is missing": (
        observed(pods=waiting("CreateContainerConfigError", "k")),
        Phase.FAILED, "CreateContainerConfigError",
    ),
    "the progress deadline has passed": (
        observed(revisions=[
            revision(R1, OLD),
            revision(R2, NEW, "False", "ProgressDeadlineExceeded", "Initial scale was never achieved"),
        ]),
        Phase.FAILED, "ProgressDeadlineExceeded",
    ),
    "Knative cannot resolve the tag": (
        observed(
            revisions=[revision(R1, OLD), revision(R2, NEW, "False", "ContainerMissing", "Unable to fetch image")]
        ),
        Phase.FAILED, "Unable to fetch image",
    ),
    "Unschedulable is a reason to wait": (
        observed(
            revisions=[revision(R1, OLD), revision(R2, NEW, "False", "Unschedulable")], pods=[pod(R2, scheduled_ago=1)]
        ),
        Phase.SCHEDULING, "Insufficient",
    ),
    "the quota refuses the update": (
        observed(service(created=R1), revisions=[revision(R1, OLD)],
                 events=[event("InferenceService", "mistral-7b", "InternalError", QUOTA)]),
        Phase.FAILED, "exceeded quota",
    ),
    "ready, without users": (
        observed(service(ready=R2, traffic={R2: 0, R1: 100}), revisions=BOTH), Phase.READY, "gets no requests",
    ),
    "ready, and the hosts still mean the old one": (
        observed(service(ready=R2), revisions=BOTH), Phase.SETTLING, "0 %",
    ),
    "the traffic has not followed the percent yet": (
        observed(service(percent=10, ready=R2), revisions=BOTH), Phase.SETTLING, "10 %",
    ),
    "split": (
        observed(service(percent=10, ready=R2, traffic={R2: 10, R1: 90}), revisions=BOTH),
        Phase.SPLIT, "gets 10 %",
    ),
    "promoted, and the traffic is on its way": (
        observed(service(percent=None, ready=R2, traffic={R2: 10, R1: 90}),
                 revisions=BOTH),
        Phase.SETTLING, "100 %",
    ),
    "ready once, and its pod crashes now": (
        observed(
            service(NEW, None, ready=R2, rolled_out=R2, traffic={R2: 100}), revisions=BOTH,
            pods=waiting("CrashLoopBackOff", restarts=3, ended=CRASHED),
        ),
        Phase.FAILED, "3 times",
    ),
    "woken from zero": (
        observed(
            service(NEW, None, ready=R2, rolled_out=R2, traffic={R2: 100}), revisions=BOTH,
            pods=[pod(R2, scheduled_ago=3)],
        ),
        Phase.STABLE, "waits for a node",
    ),
    "reverting: the old image's own revision is not there yet": (
        observed(service(OLD, 0, ready=R2), revisions=BOTH), Phase.PENDING, OLD,
    ),
    "observedGeneration equal to generation says nothing": (
        observed(service(observed_generation=7)), Phase.PENDING, "no pod yet",
    ),
    "observedGeneration behind generation says nothing": (
        observed(service(OLD, None, created=R1, observed_generation=1), revisions=[revision(R1, OLD)]),
        Phase.STABLE, R1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_its_phase_and_its_sentence(name: str) -> None:
    objects, phase, sentence = STATES[name]
    status = compute(objects)
    assert status.phase == phase, status.describe()
    assert sentence in status.message


def test_an_event_from_before_the_last_patch_says_nothing() -> None:
    old_news = event("InferenceService", "mistral-7b", "InternalError", QUOTA, seconds_ago=60)
    objects = observed(service(created=R1), revisions=[revision(R1, OLD)], events=[old_news])
    assert compute(objects, changed=NOW - timedelta(seconds=30)).phase == Phase.PENDING
    assert compute(objects, changed=NOW - timedelta(seconds=90)).phase == Phase.FAILED


def test_a_service_that_says_ready_is_still_pending_while_its_new_revision_starts() -> None:
    objects = observed()
    assert objects.service["status"]["conditions"] == [{"type": "Ready", "status": "True"}]
    assert compute(objects).phase == Phase.PENDING


def test_a_failed_revision_that_is_not_the_newest_does_not_fail_the_service() -> None:
    revisions = [revision(R1, OLD), revision(R2, NEW, "False", "ProgressDeadlineExceeded"), revision(R3, OLD)]
    status = compute(observed(service(OLD, 0, created=R3, ready=R3, traffic={R3: 0, R1: 100}), revisions=revisions))
    assert status.phase == Phase.READY
    assert status.candidate is not None
    assert status.candidate.name == R3


@pytest.mark.parametrize(("text", "value"), [("1800s", 1800), ("30m", 1800), ("1h30m", 5400), ("500ms", 0.5)])
def test_durations_are_read_as_go_writes_them(text: str, value: float) -> None:
    assert seconds(text) == value


def test_a_bare_number_is_no_duration() -> None:
    with pytest.raises(ValueError, match="90s, 30m"):
        seconds("1800")
