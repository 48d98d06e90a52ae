"""A server whose interpreter is stuck as a whole is replaced within a minute or so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from tests.e2e.cluster import Release, wait_until
from tests.e2e.load import ask
from tests.e2e.test_rollout import FAULTY_IMAGE

WATCHDOG_AND_ROOM_S = 50 + 70


def test_a_stuck_interpreter_ends_its_container_and_leaves_the_stacks_in_its_log(
    make_release: Callable[[str], Release],
) -> None:
    release = make_release("-stuck")
    replace(release, images=(FAULTY_IMAGE.format(fault="stuck"),) * 2).install()
    release.wait_until_ready()
    [pod] = release.objects("pod")

    def restarts() -> int:
        [pod] = release.objects("pod")
        return sum(c["restartCount"] for c in pod["status"]["containerStatuses"] if c["name"] == "kserve-container")

    assert restarts() == 0
    target = release.target

    def ask_until_it_is_stuck() -> None:
        for _ in range(20):
            ask(target)

    threading.Thread(target=ask_until_it_is_stuck, daemon=True).start()  # a pool's thread would delay the exit

    wait_until(lambda: restarts() == 1, "the container was restarted", WATCHDOG_AND_ROOM_S)
    log = release.kubectl("logs", pod["metadata"]["name"], "--container", "kserve-container", "--previous")
    assert "Timeout (0:00:50)!" in log
    assert 'File "/app/faulty.py", line' in log
    release.uninstall()
