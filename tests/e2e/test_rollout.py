"""`mistral rollout deploy` under load: a good image reaches everyone, a bad one is reverted without help."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from charts.render_manifests import tool
from tests.e2e.cluster import NAME, Release
from tests.e2e.load import ask, failures, under_load

FAULTY_IMAGE = os.environ.get("E2E_FAULTY_IMAGE", "dev.local/mistral-7b-kserve:{fault}")
PROMOTED, REVERTED, OUT_OF_TIME = 0, 1, 4
FIRST_STEP = 0.10
CHANCE = 0.05
"""How far the share of requests that reach a canary may be from its percent."""


def deploy(release: Release, image: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the result of a rollout."""
    command = [tool("mistral"), "rollout", "deploy", NAME, "--image", image, "--output", "json", *options]
    command += ["--context", release.context, "--namespace", release.namespace, "--url", release.gateway]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_a_good_image_is_promoted_without_losing_a_request(release: Release) -> None:
    before, image = release.newest_ready_revision, release.other_image

    with under_load(release.target) as answers:
        code, result = deploy(release, image)

    assert (code, result["result"]) == (PROMOTED, "promoted")
    assert failures(answers) == []
    assert release.image == image
    assert release.traffic == {release.newest_ready_revision: 100}
    assert release.newest_ready_revision != before


@pytest.mark.parametrize("fault", ["crash", "nonsense", "slow", "never-ready", "cut-streams"])
def test_a_bad_image_is_reverted_and_reaches_no_more_than_its_share(release: Release, fault: str) -> None:
    good = release.image
    right = ask(release.target, stream=True)
    assert right.failure == ""

    with under_load(release.target, stream=True) as answers:
        code, result = deploy(release, FAULTY_IMAGE.format(fault=fault), "--timeout", "6m")

    assert code in (REVERTED, OUT_OF_TIME), result
    assert release.image == good
    assert release.traffic == {release.newest_ready_revision: 100}
    assert ask(release.target, stream=True).text == right.text
    wrong = failures(answers) + [answer.text for answer in answers if not answer.failure and answer.text != right.text]
    assert len(wrong) <= (FIRST_STEP + CHANCE) * len(answers)
