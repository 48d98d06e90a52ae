"""An accepted request survives a kill and a full disk, and is deleted after its retention."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import httpx

from tests.support.relay import OK, ask, ended
from tests.support.scripted_server import ScriptedServer
from tests.support.server_process import free_port


def test_a_full_disk_refuses_and_keeps_what_was_accepted(serve):
    client = serve(OK)
    known = ask(client).json()["request_id"]
    ended(client, known)
    store = client.app.state.store
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={pages}")

    statuses = {ask(client, model_input={"prompt": "x" * 100_000}).status_code for _ in range(3)}

    store._db.execute("PRAGMA max_page_count=1000000")
    assert statuses == {503}
    assert client.get(f"/async_request/{known}").json()["status"] == "SUCCEEDED"
    assert ask(client).status_code == 201


def test_a_finished_request_is_deleted_after_its_retention(serve):
    client = serve(OK, retention_s=0)
    request_id = ask(client).json()["request_id"]

    while client.get(f"/async_request/{request_id}").status_code != 404:
        pass

    assert len(client.upstream.asked) == 1


def test_killed_at_any_moment_every_accepted_request_is_answered_under_its_id(tmp_path):
    chance, accepted = random.Random(3), []
    port = free_port()
    with ScriptedServer([OK]) as upstream, httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        environ = {
            **os.environ, "PYTHONPATH": os.getcwd(), "MISTRAL_RELAY_UPSTREAM_URL": upstream.url,
            "MISTRAL_RELAY_DATABASE": str(tmp_path / "relay.sqlite"), "MISTRAL_RELAY_PORT": str(port),
        }  # fmt: skip
        for _ in range(4):
            process = subprocess.Popen([sys.executable, "-m", "mistral_relay"], env=environ, stderr=subprocess.DEVNULL)
            for _ in range(chance.randint(3, 12)):
                accepted.append(_accept(http, process))
            process.send_signal(signal.SIGKILL)
            process.wait()
        process = subprocess.Popen([sys.executable, "-m", "mistral_relay"], env=environ, stderr=subprocess.DEVNULL)
        accepted.append(_accept(http, process))
        shown = [ended(http, request_id) for request_id in accepted]  # type: ignore[arg-type]
        process.terminate()
        process.wait(30)
        ids = {asked.headers["x-request-id"] for asked in upstream.asked}

    assert {one["status"] for one in shown} == {"SUCCEEDED"}
    assert ids == set(accepted)
    with sqlite3.connect(tmp_path / "relay.sqlite") as db:
        assert db.execute("SELECT count(*) FROM requests").fetchone() == (len(accepted),)
    db.close()


def _accept(http: httpx.Client, process: subprocess.Popen[bytes]) -> str:
    """Send one request, waiting for the relay to listen; return its id."""
    while True:
        assert process.poll() is None
        try:
            response = http.post("/async_predict", content=json.dumps({"model_input": {"prompt": "hi"}}))
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            assert response.status_code == 201, response.text
            return str(response.json()["request_id"])
