"""An image is in its registry, or on a node."""

from __future__ import annotations

import pytest

from mistral_cli.objects import Object
from mistral_cli.preflight.checks import image
from mistral_cli.preflight.checks.finding import State
from mistral_cli.preflight.observed import Answer, External, Observed
from tests.support.preflight_checks import TARGET, release

pytestmark = pytest.mark.chart


@pytest.mark.parametrize(
    ("images", "state"),
    [
        ([{"names": ["dev.local/mistral-7b-kserve:demo"]}], State.OK),
        ([{"names": ["dev.local/other:1"]}], State.MISSING),
        ([{"names": [f"dev.local/other:{number}"]} for number in range(50)], State.UNKNOWN),
    ],
)
def test_an_image_that_is_never_pulled_must_be_on_a_node(images: list[Object], state: State) -> None:
    nodes = [{"metadata": {"name": "n"}, "status": {"images": images}}]
    (finding,) = image.check(release("minimal-cpu"), Observed(nodes=Answer(nodes)), External(), TARGET)
    assert finding.state == state
