"""What a client sees of an installed release through the ingress."""

from __future__ import annotations

import os

from tests.e2e.cluster import Release, wait_until
from tests.e2e.load import ask, ask_many, failures, under_load

STREAMS = int(os.environ.get("E2E_STREAMS", "300"))
IDLE_S = 600
"""Knative's stable window, the pod's drain and queue-proxy's shutdown, with room."""


def test_the_same_text_is_answered_whole_and_streamed(release: Release) -> None:
    whole, streamed = ask(release.target), ask(release.target, stream=True)

    assert failures([whole, streamed]) == []
    assert whole.text
    assert streamed.text == whole.text


def test_no_stream_is_cut(release: Release) -> None:
    assert failures(ask_many(release.target, STREAMS, clients=20, stream=True, max_new_tokens=24)) == []


def test_an_idle_model_goes_to_zero_and_requests_that_wake_it_are_held(release: Release) -> None:
    wait_until(lambda: release.objects("pod") == [], "the idle model has no pod", IDLE_S)

    assert failures(ask_many(release.target, 60, clients=30)) == []


def test_a_pod_that_is_deleted_finishes_its_streams(release: Release) -> None:
    [pod] = release.objects("pod")

    with under_load(release.target, stream=True, max_new_tokens=200) as answers:
        wait_until(lambda: len(answers) > 8, "streams run")
        release.kubectl("delete", "pod", pod["metadata"]["name"])

    assert failures(answers) == []
