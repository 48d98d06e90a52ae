"""New images and canaries under load, by the commands of docs/rollouts.md: no request is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import Release
from tests.e2e.load import failures, under_load

BODIES: dict[str, dict[str, Any]] = {"whole": {}, "streamed": {"stream": True, "max_new_tokens": 200}}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_new_image_takes_over_without_losing_a_request(release: Release, body: dict[str, Any]) -> None:
    before = release.newest_ready_revision
    with under_load(release.target, **body) as answers:
        release.upgrade(release.other_image)
        after = release.wait_for_new_revision(before)
        release.wait_for_traffic({after: 100})
        release.wait_until_stopped(before)

    assert failures(answers) == []


def test_a_canary_is_promoted_without_losing_a_request(release: Release) -> None:
    before = release.newest_ready_revision
    with under_load(release.target) as answers:
        image = release.other_image
        release.upgrade(image, canary_percent=10)
        canary = release.wait_for_new_revision(before)
        release.wait_for_traffic({before: 90, canary: 10})
        release.upgrade(image, canary_percent=50)
        release.wait_for_traffic({before: 50, canary: 50})
        release.upgrade(image, canary_percent=100)
        release.wait_for_traffic({canary: 100})
        release.wait_until_stopped(before)

    assert failures(answers) == []


def test_a_canary_is_stopped_and_reverted_without_losing_a_request(release: Release) -> None:
    before, good = release.newest_ready_revision, release.image
    with under_load(release.target) as answers:
        canary_image = release.other_image
        release.upgrade(canary_image, canary_percent=50)
        canary = release.wait_for_new_revision(before)
        release.wait_for_traffic({before: 50, canary: 50})
        release.upgrade(canary_image, canary_percent=0)
        release.wait_for_traffic({before: 100})
        release.upgrade(good, canary_percent=0)
        restored = release.wait_for_new_revision(canary)
        release.upgrade(good, canary_percent=100)
        release.wait_for_traffic({restored: 100})
        release.wait_until_stopped(canary)

    assert failures(answers) == []
