"""Clients that mean harm or know no better: what is too much or too slow ends, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from model_server.api.http.middleware import LimitsMiddleware
from tests.support.server_process import ServerProcess

STALL_SECONDS = 1
PREDICT = "/v1/models/mistral-7b:predict"
HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\n".encode()
BODY = b'{"prompt": "hello", "max_new_tokens": 2}'


@pytest.fixture(scope="module")
def edge(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server that is quick to give a client up."""
    return start_server("--client_stall_seconds", str(STALL_SECONDS), "--request_timeout_seconds", "60")


def connect(server: ServerProcess) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the server ends the connection."""
    received = bytearray()
    try:
        while piece := connection.recv(2**16):
            received += piece
    except ConnectionResetError:
        pass
    return bytes(received)


def dribble(connection: socket.socket, data: bytes, limit_s: float = 15) -> bytes:
    """Send the same bytes again and again, a little at a time, until the server ends it; return its answer."""
    deadline_s = time.monotonic() + limit_s
    connection.settimeout(0.1)
    received = bytearray()
    while time.monotonic() < deadline_s:
        try:
            connection.sendall(data)
            if not (piece := connection.recv(2**16)):
                return bytes(received)
            received += piece
        except TimeoutError:
            continue
        except OSError:
            return bytes(received)
    raise AssertionError("the server has not ended the connection")


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["code"]


def num_open_files(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def resident_mib(server: ServerProcess) -> float:
    [line] = [x for x in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -1", b"Content-Length: +40", b"Content-Length: 4e1", b"Content-Length: x", b"Content-Length:",
        b"Content-Length: 99999999999999999999999", b"Content-Length: 40\r\nContent-Length: 41",
        b"Content-Length: 40\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked", b"A: \0\r\nContent-Length: 40",
        b"Transfer-Encoding: chunked\r\n\r\nzz", b"Transfer-Encoding: chunked\r\n\r\n-1", b"\xff: a", b"A B: c",
        b"A: " + b"x" * 300_000,
    ],
    ids=lambda head: head[:60].decode("latin-1").replace("\r\n", " "),
)  # fmt: skip
def test_bytes_that_are_not_http_are_a_400_and_the_end(edge: ServerProcess, head: bytes) -> None:
    with connect(edge) as connection:
        connection.sendall(HEAD + head + b"\r\nConnection: close\r\n\r\n" + BODY)
        answer = read_to_end(connection)

    assert status_and_code(answer) == (400, "bad_request")


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [
        (b"Content-Length: 9999999999999", b"", (413, "body_too_large")),
        (b"\r\n".join(b"A%d: b" % i for i in range(101)), b"", (431, "headers_too_large")),
        (b"A: " + b"x" * 40_000, b"", (431, "headers_too_large")),
        (b"Content-Length: 100000", b"[" * 100_000, (400, "bad_request")),
        (b"Content-Length: 900000", b'{"a":' * 150_000 + b"1" + b"}" * 149_999, (400, "bad_request")),
    ],
    ids=["huge body", "many headers", "long header", "deep list", "deep object"],
)
def test_too_much_is_refused_at_once(edge: ServerProcess, head: bytes, body: bytes, expected: tuple[int, str]) -> None:
    began_s = time.monotonic()
    with connect(edge) as connection:
        connection.sendall(HEAD + b"Connection: close\r\n" + head + b"\r\n\r\n" + body)
        answer = read_to_end(connection)

    assert status_and_code(answer) == expected
    assert time.monotonic() - began_s < STALL_SECONDS


def test_a_log_shows_no_traceback_for_what_clients_do(edge: ServerProcess) -> None:
    with connect(edge) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        read_to_end(connection)

    assert "Traceback" not in edge.log


@pytest.mark.parametrize("first", [b"", HEAD, HEAD + b"A: b"], ids=["nothing", "a line", "half a header"])
def test_a_request_that_is_never_finished_is_given_up(edge: ServerProcess, first: bytes) -> None:
    with connect(edge) as connection:
        connection.sendall(first)
        assert read_to_end(connection) == b""


def test_a_head_that_dribbles_is_given_up(edge: ServerProcess) -> None:
    with connect(edge) as connection:
        connection.sendall(HEAD + b"A: ")
        assert dribble(connection, b"x") == b""


def test_a_body_that_dribbles_is_a_408(edge: ServerProcess) -> None:
    with connect(edge) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        answer = dribble(connection, b" ")

    assert status_and_code(answer) == (408, "too_slow")


def test_the_body_of_a_refused_request_is_not_waited_for(edge: ServerProcess) -> None:
    with connect(edge) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        answer = dribble(connection, b" ")

    assert status_and_code(answer) == (404, "not_found")


def test_a_reader_that_stops_is_given_up_and_its_socket_closed(edge: ServerProcess) -> None:
    before = num_open_files(edge)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        connection.connect(("127.0.0.1", edge.port))
        connection.settimeout(0.5)
        try:  # more answers than the kernel holds for a reader that is not there
            for _ in range(2000):
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
        except OSError:
            pass
        wait_for(lambda: num_open_files(edge) <= before)


def test_200_slow_clients_do_not_keep_a_good_one_waiting_nor_leave_anything(edge: ServerProcess) -> None:
    httpx.post(edge.url + PREDICT, content=BODY)
    files, mib = num_open_files(edge), resident_mib(edge)

    with ExitStack() as slow:
        connections = [slow.enter_context(connect(edge)) for _ in range(200)]
        for i, connection in enumerate(connections):
            connection.sendall(HEAD + (b"Content-Length: 1000000\r\n\r\n" if i % 2 else b"A: "))
        for _ in range(5):
            answer = httpx.post(edge.url + PREDICT, content=BODY, timeout=10)
            assert answer.status_code == 200
        wait_for(lambda: num_open_files(edge) <= files)

    assert resident_mib(edge) - mib < 32


def test_a_body_on_a_slow_link_is_taken_as_long_as_it_comes() -> None:
    pieces = [b"x" * 1024] * 10
    taken = bytearray()

    async def receive() -> Message:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

    async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            taken.extend(message["body"])
            more = message["more_body"]

    async def send(message: Message) -> None:
        raise AssertionError(message)

    limits = LimitsMiddleware(read_all, max_request_bytes=2**20, client_stall_s=0.1)
    asyncio.run(limits({"type": "http", "headers": []}, receive, send))

    assert len(taken) == 10 * 1024  # in twice the time that a body has which does not come
