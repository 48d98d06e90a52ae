"""The command as a process: exit codes, JSON, signals, and a cluster that moves by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mistral_cli.app import app
from tests.support.cluster_api.api import CONTEXT, Fault
from tests.support.cluster_api.gateway import FAILING, GOOD, Behaviour, Gateway, serving
from tests.support.cluster_api.knative import Image
from tests.support.cluster_api.kserve import NAME, NAMESPACE
from tests.support.cluster_api.runs import NEW, OLD, Bench, bench, ticking

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/rollout-{NAME}"
GATES = "prompts: [a, b]\nrequests: 4\nconcurrency: 2\nttft_slack_s: 5\nmin_tokens_per_second_ratio: 0\n"


@dataclass
class Live:
    """A cluster that moves, its gateway, and the command."""

    at: Bench
    gateway: Gateway
    folder: Path

    def arguments(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "mistral_cli", "rollout", *args, "--context", CONTEXT]

    def deploy(self, *more: str, image: str = NEW) -> subprocess.Popen[str]:
        gates = self.folder / "gates.yaml"
        gates.write_text(GATES)
        args = ["deploy", NAME, "--image", image, "--gates", str(gates), "--url", self.gateway.url, "--poll", "0.05"]
        return self.start(*args, *more)

    def start(self, *args: str) -> subprocess.Popen[str]:
        env = os.environ | {"KUBECONFIG": str(self.at.kubeconfig)}
        return subprocess.Popen(
            self.arguments(*args), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def until(self, met: Callable[[], bool]) -> None:
        for _ in range(600):
            if met():
                return
            time.sleep(0.05)
        raise AssertionError("it never happened")

    def forget_the_lock(self) -> None:
        """Let the time pass in which a killed runner still has the lock."""
        with self.at.world.store.lock:
            self.at.world.store.objects[LEASE]["spec"]["renewTime"] = "2020-01-01T00:00:00.000000Z"


@contextmanager
def live(folder: Path, behaviour: Behaviour = GOOD, **world: object) -> Iterator[Live]:
    with bench(folder, **world) as at, serving(at.world) as gateway, ticking(at.world):
        gateway.behaviours[NEW] = behaviour
        yield Live(at, gateway, folder)


def test_a_good_image_is_promoted_and_the_last_line_is_one_json_object(tmp_path: Path) -> None:
    with live(tmp_path) as cluster:
        process = cluster.deploy("--output", "json", "--summary", str(tmp_path / "summary.md"))
        stdout, stderr = process.communicate(timeout=90)
        assert process.returncode == 0, stderr
        said = json.loads(stdout.strip().splitlines()[-1])
        assert (said["result"], said["revision"], said["previous"]) == ("promoted", NEW, OLD)
        assert {gate["name"] for gate in said["gates"]} >= {"error_rate", "ttft_p95_ratio", "golden_distance"}
        assert all(gate["passed"] for gate in said["gates"])
        assert cluster.at.users() == {NEW: 100}
        assert "| error_rate | 0 | 0 | yes |" in (tmp_path / "summary.md").read_text()


def test_a_bad_image_ends_with_exit_code_1_and_the_gate_that_saw_it(tmp_path: Path) -> None:
    with live(tmp_path, FAILING) as cluster:
        process = cluster.deploy("--output", "json")
        stdout, _ = process.communicate(timeout=90)
        assert process.returncode == 1
        said = json.loads(stdout.strip().splitlines()[-1])
        assert said["result"] == "reverted"
        assert [gate["name"] for gate in said["gates"] if gate["passed"] is False] == ["error_rate"]
        assert cluster.at.users() == {OLD: 100}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_rollout_is_reverted(tmp_path: Path, sent: signal.Signals) -> None:
    with live(tmp_path, images={NEW: Image(hangs=True)}) as cluster:
        process = cluster.deploy()
        cluster.until(lambda: NEW in cluster.at.world.images_by_revision().values())
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=90)
        assert process.returncode == 1, stderr
        assert "Reverting: interrupted" in stdout
        assert cluster.at.users() == {OLD: 100}
        assert NEW not in cluster.at.world.images_by_revision().values()


def test_a_rollout_that_is_interrupted_before_its_first_change_is_refused(tmp_path: Path) -> None:
    with live(tmp_path) as cluster:
        store = cluster.at.world.store
        store.faults.append(Fault("GET", "inferenceservices", 503, "connection refused", times=10_000))
        process = cluster.deploy()
        cluster.until(lambda: LEASE in store.objects)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=90)
        assert process.returncode == 3, stderr
        assert "Interrupted before any change." in stderr


def test_a_revert_that_is_interrupted_names_the_commands_that_continue_it(tmp_path: Path) -> None:
    with live(tmp_path, images={NEW: Image(hangs=True)}) as cluster:
        process = cluster.deploy("--namespace", NAMESPACE)
        cluster.until(lambda: NEW in cluster.at.world.images_by_revision().values())
        fault = Fault("PATCH", "inferenceservices", 503, "connection refused", times=10_000)
        cluster.at.world.store.faults.append(fault)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert any("Reverting: interrupted" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=90)
        assert process.returncode == 5, stderr
        assert f"Undo: mistral rollout revert {NAME} --context {CONTEXT} --namespace {NAMESPACE}" in stderr


def test_a_missing_right_and_bad_credentials_are_refused_with_what_to_do(tmp_path: Path) -> None:
    sentences = {403: "manifests/ci/rollout.yaml grants the rights", 401: "does not accept the credentials"}
    for status, sentence in sentences.items():
        with bench(tmp_path) as at:
            at.world.store.faults.append(Fault("GET", "leases", status, "Unauthorized"))
            env = {"KUBECONFIG": str(at.kubeconfig)}
            ran = CliRunner().invoke(app, ["rollout", "deploy", NAME, "--image", NEW, "--context", CONTEXT], env=env)
            assert ran.exit_code == 3, ran.output
            assert sentence in ran.output


def test_a_killed_runner_leaves_what_the_next_one_finishes(tmp_path: Path) -> None:
    with live(tmp_path) as cluster:
        process = cluster.deploy()
        cluster.until(lambda: cluster.at.world.shares[-1].get(NEW, 0) >= 10)
        process.kill()
        process.communicate()
        refused = cluster.deploy()
        _, stderr = refused.communicate(timeout=90)
        assert refused.returncode == 3
        assert "has the lock of this rollout" in stderr
        cluster.forget_the_lock()
        again = cluster.deploy()
        stdout, _ = again.communicate(timeout=90)
        assert again.returncode == 0
        assert "Resuming the rollout of" in stdout
        assert cluster.at.users() == {NEW: 100}


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    with live(tmp_path) as cluster:
        process = cluster.deploy("--dry-run")
        stdout, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert f"patch    image {NEW}, 0 % of the traffic" in stdout
        assert "If anything fails:" in stdout
        assert {method for method, _, _ in cluster.at.world.store.asked} == {"GET"}


def test_status_and_history_say_where_it_stands(tmp_path: Path) -> None:
    with live(tmp_path) as cluster:
        for verb, word in (("status", "Stable: "), ("history", f"{NAME}-predictor-00001")):
            process = cluster.start(verb, NAME)
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == 0, stderr
            assert word in stdout


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("deploy", NAME, "--image", NEW), 2, "--context"),
        (("deploy", NAME, "--image", NEW, "--context", "other"), 3, "other"),
        (("deploy", NAME, "--image", NEW, "--context", CONTEXT, "--strategy", "blue"), 2, "canary or swap"),
        (("deploy", NAME, "--image", NEW, "--context", CONTEXT, "--steps", "50,10"), 2, "must rise"),
        (("deploy", NAME, "--image", NEW, "--context", CONTEXT, "--timeout", "45"), 2, "90s, 30m"),
        (("deploy", NAME, "--image", NEW, "--context", CONTEXT, "--gates", "/nonexistent"), 2, "cannot be read"),
        (("deploy", "absent", "--image", NEW, "--context", CONTEXT), 3, "no InferenceService absent"),
        (("promote", NAME, "--context", CONTEXT), 3, "No rollout"),
    ],
)
def test_misuse_and_refusals_have_their_exit_codes(
    tmp_path: Path, args: tuple[str, ...], code: int, sentence: str
) -> None:
    with bench(tmp_path) as at:
        env = {"KUBECONFIG": str(at.kubeconfig), "COLUMNS": "200"}
        ran = CliRunner().invoke(app, ["rollout", *args], env=env)
        assert ran.exit_code == code, ran.output
        assert sentence in ran.output
