"""Standard mode: the same verbs on `spec.canary[]` and the HTTPRoute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.planning.preconditions import Refused
from tests.support.cluster_api.knative import Image
from tests.support.cluster_api.kserve import NAME, SERVICE
from tests.support.cluster_api.runs import NEW, OLD, Bench, bench
from tests.support.cluster_api.standard import StandardWorld

STANDARD: dict[str, Any] = {"kind": StandardWorld}


def spec(at: Bench) -> dict[str, Any]:
    found: dict[str, Any] = at.world.store.objects[SERVICE]["spec"]
    return found


def test_the_stable_predictor_gets_the_image_while_the_canary_serves(tmp_path: Path) -> None:
    with bench(tmp_path, **STANDARD) as at:
        lost_at_install = list(at.world.lost)
        assert at.deploy() == verbs.PROMOTED
        at.world.tick()
        assert at.users() == {NEW: 100}
        assert at.verdicts.measured == [0, 10, 50]
        assert "canary" not in spec(at)
        assert at.world.images_by_name() == {f"{NAME}-predictor": NEW}
        assert at.world.lost == lost_at_install


@pytest.mark.parametrize("share", [100, 0])
def test_ctrl_c_in_the_promotion_brings_the_old_image_back_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    with bench(tmp_path, **STANDARD) as at:
        lost_at_install, tick, pressed = list(at.world.lost), at.world.tick, []

        def press_ctrl_c_in_the_promotion() -> None:
            tick()
            in_promotion = spec(at)["predictor"]["containers"][0]["image"] == NEW and "canary" in spec(at)
            if in_promotion and spec(at)["canary"][0]["trafficPercent"] == share and not pressed:
                pressed.append(True)
                raise KeyboardInterrupt

        monkeypatch.setattr(at.world, "tick", press_ctrl_c_in_the_promotion)
        assert at.deploy() == verbs.REVERTED
        assert pressed
        assert at.users() == {OLD: 100}
        assert at.world.removed_with_traffic == []
        assert at.world.lost == lost_at_install


@pytest.mark.parametrize("bad", [None, 10, 50])
def test_a_canary_has_no_traffic_when_it_is_removed(tmp_path: Path, bad: int | None) -> None:
    with bench(tmp_path, **STANDARD) as at:
        if bad is not None:
            at.verdicts.fails_from[NEW] = bad
        assert at.deploy() == (verbs.PROMOTED if bad is None else verbs.REVERTED)
        assert at.world.removed_with_traffic == []


def test_the_canary_has_one_replica_and_its_own_name(tmp_path: Path) -> None:
    with bench(tmp_path, **STANDARD) as at:
        seen: list[Any] = []
        at.verdicts.on_measure = lambda share: seen.append(spec(at)["canary"][0])
        at.deploy()
        assert seen[1]["trafficPercent"] == 10
        assert seen[1]["predictor"]["minReplicas"] == 1
        assert seen[1]["predictor"]["name"].startswith("v")


def test_a_second_rollout_gets_another_name(tmp_path: Path) -> None:
    with bench(tmp_path, **STANDARD) as at:
        at.deploy()
        assert at.deploy(OLD) == verbs.PROMOTED
        assert at.deploy(NEW) == verbs.PROMOTED
        assert at.users() == {NEW: 100}


@pytest.mark.parametrize("image", [Image(crashes=True), Image(hangs=True)])
def test_a_canary_that_does_not_start_is_dropped(tmp_path: Path, image: Image) -> None:
    with bench(tmp_path, images={NEW: image}, **STANDARD) as at:
        assert at.deploy() in (verbs.REVERTED, verbs.TIMED_OUT)
        assert at.users() == {OLD: 100}
        assert list(at.world.images_by_name().values()) == [OLD]


@pytest.mark.parametrize("share", [0, 10, 50])
def test_users_meet_a_bad_canary_at_most_at_the_share_where_the_gates_see_it(tmp_path: Path, share: int) -> None:
    with bench(tmp_path, **STANDARD) as at:
        at.verdicts.fails_from[NEW] = share
        assert at.deploy() == verbs.REVERTED
        assert max(shares.get(NEW, 0) for shares in at.world.shares) == share
        assert at.users() == {OLD: 100}


def test_without_the_gateway_api_nothing_is_split_and_the_rollout_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path, gateway_api=False, **STANDARD) as at, pytest.raises(Refused, match="no HTTPRoute"):
        at.deploy()


def test_without_a_storage_uri_kserve_takes_no_canary_and_the_rollout_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path, **STANDARD) as at:
        spec(at)["predictor"]["containers"][0]["env"] = []
        with pytest.raises(Refused, match="no STORAGE_URI"):
            at.deploy()


def test_a_swap_needs_knatives_activator(tmp_path: Path) -> None:
    with bench(tmp_path, **STANDARD) as at, pytest.raises(Refused, match="only Knative's activator"):
        at.deploy(strategy="swap")


def test_a_killed_runner_leaves_what_the_next_one_finishes(tmp_path: Path) -> None:
    for dies_at in range(20, 240, 20):
        with bench(tmp_path, **STANDARD) as at:
            at.deploy(dies_at=dies_at)
            for _ in range(30):
                at.world.tick()
            assert at.deploy(owner="runner-2") == verbs.PROMOTED
            assert at.users() == {NEW: 100}


def test_a_runner_that_was_killed_right_after_the_promotion_is_finished_by_the_next_one(tmp_path: Path) -> None:
    loads_longer_than_the_lock_holds = {NEW: Image(load_ticks=60)}
    with bench(tmp_path, images=loads_longer_than_the_lock_holds, **STANDARD) as at:
        at.deploy()
        requests = [(method, path) for method, path, _ in at.world.store.asked]
        last_patch = len(requests) - requests[::-1].index(("PATCH", SERVICE))
    with bench(tmp_path, images=loads_longer_than_the_lock_holds, **STANDARD) as at:
        assert at.deploy(dies_at=2 * last_patch + 1) is None  # the client counts a request and its answer
        assert "canary" not in spec(at)
        for _ in range(30):
            at.world.tick()
        assert at.deploy(owner="runner-2", timeout_s=600) == verbs.PROMOTED
