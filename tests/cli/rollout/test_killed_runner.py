"""A runner may die at any request to the API server: the next one ends its rollout, and users never notice."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mistral_cli.rollout.record import Progress
from tests.support.cluster_api.knative import Image
from tests.support.cluster_api.runs import NEW, OLD, bench

THIRD = "dev.local/mistral:third"
BAD = {
    "crashes": Image(crashes=True),
    "cannot be pulled": Image(pull_error='failed to pull image "x": manifest unknown'),
    "hangs": Image(hangs=True),
}


@settings(
    max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate)
)
@given(
    seed=st.integers(0, 10_000),
    kills=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    fails_from=st.sampled_from([0, 10, 50, 101]),
    broken=st.sampled_from([None, *BAD]),
    next_image=st.sampled_from([NEW, THIRD]),
    strategy=st.sampled_from(["canary", "swap"]),
)
def test_whenever_the_runner_dies_the_next_run_ends_promoted_or_reverted(
    seed: int, kills: list[int], fails_from: int, broken: str | None, next_image: str, strategy: str
) -> None:
    with tempfile.TemporaryDirectory() as folder, bench(Path(folder), seed=seed) as at:
        if broken:
            at.world.images[NEW] = BAD[broken]
        at.verdicts.fails_from[NEW] = fails_from
        for number, kill_at in enumerate(kills):
            outcome = at.deploy(owner=f"runner-{number}", dies_at=kill_at, strategy=strategy)
            for _ in range(30):  # its lock expires; the cluster goes on without it
                at.world.tick()
            if outcome is not None:
                break
        last = at.deploy(next_image, owner="the last runner", strategy=strategy)
        serving = at.users()

        assert sum(serving.values()) == 100
        assert set(serving) == ({next_image} if last == "promoted" else {OLD}), at.logged
        if last == "promoted":
            assert next_image == THIRD or (fails_from == 101 and broken is None)
        if strategy == "canary" and (broken or fails_from <= 50):
            most = 0 if broken else {0: 0, 10: 10, 50: 50}[fails_from]
            assert max(shares.get(NEW, 0) for shares in at.world.shares) <= most
        record = at.executor().lock.record()
        assert record is not None
        assert record.progress in (Progress.PROMOTED, Progress.REVERTED)
