"""Sends requests to the versions of a service through the ingress, and times the responses."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from mistral_cli import answer as wire
from mistral_cli.exit_codes import Failure, Incomplete
from mistral_cli.rollout.gates.rules import Answer, Gates, Measurements

CONNECT_S = 10.0
WAKE_S = 900.0
"""Seconds that a held request may wait for a node, a download and the load."""
NOT_ROUTED_YET = frozenset({404, 502, 503})
ROUTING_S = 60.0
"""Seconds in which a gateway must route a new host."""
BUSY = 429
BUSY_ATTEMPTS = 5


@dataclass(frozen=True)
class Endpoint:
    """The address of one version, or the users' address."""

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, Any] = field(default_factory=dict)


def endpoint(url: str, entry: str = "", host: str = "") -> Endpoint:
    """Return how to reach `url`: directly, or through the gateway `entry` with its host in the `Host` header."""
    if not entry:
        return Endpoint(url.rstrip("/"), {"Host": host} if host else {})
    wanted = urlsplit(url)
    name = host or wanted.netloc
    extensions = {"sni_hostname": name.partition(":")[0]} if entry.startswith("https:") else {}
    return Endpoint(entry.rstrip("/") + wanted.path.rstrip("/"), {"Host": name}, extensions)


class Meter:
    """One HTTP client for all requests of a rollout."""

    def __init__(self, gates: Gates, headers: Mapping[str, str], model: str | None) -> None:
        self._gates, self._model = gates, model
        self._http = httpx.Client(headers=dict(headers))

    def close(self) -> None:
        self._http.close()

    def compare(self, stable: Endpoint | None, candidate: Endpoint) -> tuple[Measurements, Measurements]:
        """Send requests to both versions at the same time; end early if the candidate can no longer pass."""
        endpoints = {"candidate": candidate, **({"stable": stable} if stable else {})}
        for name, each in endpoints.items():
            try:
                self.wake(each)
            except Failure as failure:
                if name == "candidate":
                    return Measurements(), Measurements([Answer(self._gates.prompts[0], error=str(failure))])
        answers: dict[str, list[Answer]] = {"stable": [], "candidate": []}
        stop = threading.Event()

        def collect(name: str, got: Answer) -> None:
            answers[name].append(got)
            if name == "candidate" and self._cannot_pass(answers["candidate"], answers["stable"]):
                stop.set()

        threads = [thread for name, each in endpoints.items() for thread in self._workers(name, each, collect, stop)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stop.set()  # after ^C the workers end by themselves
        return Measurements(tuple(answers["stable"])), Measurements(tuple(answers["candidate"]))

    def _cannot_pass(self, answers: list[Answer], stable: list[Answer]) -> bool:
        if any(answer.error for answer in stable):
            return False  # both may have the same fault: compare them when all requests are done
        cut = sum(answer.incomplete for answer in answers)
        errors = sum(bool(answer.error) for answer in answers) - cut
        requests = self._gates.requests
        return errors > self._gates.max_error_rate * requests or cut > self._gates.max_incomplete_rate * requests

    def _workers(
        self, name: str, each: Endpoint, collect: Callable[[str, Answer], None], stop: threading.Event
    ) -> Iterator[threading.Thread]:
        prompts: queue.SimpleQueue[str] = queue.SimpleQueue()
        for prompt in islice(cycle(self._gates.prompts), self._gates.requests):
            prompts.put(prompt)

        def work() -> None:
            while not stop.is_set():
                try:
                    prompt = prompts.get_nowait()
                except queue.Empty:
                    return
                if (got := self.ask(each, prompt)) is not None:
                    collect(name, got)

        for number in range(self._gates.concurrency):
            yield threading.Thread(target=work, name=f"measure-{name}-{number}", daemon=True)

    def wake(self, each: Endpoint) -> None:
        """Send one request that may be held until a pod answers, and that the gateway may not know yet.

        Raises:
            Failure: there is no answer.
        """
        end_s = time.monotonic() + ROUTING_S
        while True:
            try:
                self._stream(each, self._gates.prompts[0], WAKE_S, 1)
                return
            except _NotRouted as error:
                if time.monotonic() > end_s:
                    raise Incomplete(str(error)) from error
                time.sleep(1)

    def ask(self, each: Endpoint, prompt: str) -> Answer | None:
        """Stream one greedy response and time it. Return None if no connection was made."""
        for attempt in range(1, BUSY_ATTEMPTS + 1):
            try:
                return self._stream(each, prompt, self._gates.request_timeout_s, self._gates.max_new_tokens)
            except _Busy:
                time.sleep(attempt)
            except _Unreachable:  # the gateway, which both versions share
                if attempt == BUSY_ATTEMPTS:
                    return None
                time.sleep(attempt)
            except _NotRouted as error:
                return Answer(prompt, error=str(error))
            except Incomplete as failure:
                return Answer(prompt, error=str(failure), incomplete=True)
            except Failure as failure:
                return Answer(prompt, error=str(failure))
        return Answer(prompt, error="429: the queue stayed full")

    def _stream(self, each: Endpoint, prompt: str, timeout_s: float, tokens: int) -> Answer:
        body = {"prompt": prompt, "temperature": 0, "max_new_tokens": tokens, "stream": True}
        path = f"/v1/models/{quote(self._model_of(each), safe='')}:predict"
        begun_s, first_s, text = time.monotonic(), math.nan, []
        last: Mapping[str, Any] = {}
        request = self._http.build_request(
            "POST", each.base_url + path, json=body, headers=dict(each.headers),
            extensions=dict(each.extensions), timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
        )  # fmt: skip
        try:
            response = self._http.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Unreachable(f"no connection: {error}") from error
        except httpx.TransportError as error:
            raise _NotRouted(f"no answer: {type(error).__name__} {error}") from error
        try:
            if response.status_code == BUSY:
                raise _Busy
            if response.status_code in NOT_ROUTED_YET:
                raise _NotRouted(wire.refusal(response))
            wire.check(response)
            for last in wire.pieces(response):
                first_s = time.monotonic() if math.isnan(first_s) else first_s
                text.append(wire.text(last))
        finally:
            response.close()
        ended_s, generated = time.monotonic(), last.get("completion_tokens")
        if last.get("finish_reason") not in ("stop", "length") or not isinstance(generated, int):
            raise Incomplete("The last event has no finish_reason and completion_tokens.")
        speed = (generated - 1) / (ended_s - first_s) if generated > 1 and ended_s > first_s else math.nan
        return Answer(prompt, "".join(text), ttft_s=first_s - begun_s, tokens_per_second=speed)

    def _model_of(self, each: Endpoint) -> str:
        """Return the model's name: the given one, else the only one that the server lists."""
        if self._model is None:
            try:
                response = self._http.get(
                    f"{each.base_url}/v1/models", headers=dict(each.headers), extensions=dict(each.extensions),
                    timeout=httpx.Timeout(WAKE_S, connect=CONNECT_S),
                )  # fmt: skip
            except httpx.TransportError as error:
                raise _NotRouted(f"no answer: {type(error).__name__} {error}") from error
            if response.status_code in NOT_ROUTED_YET:
                raise _NotRouted(wire.refusal(response))
            wire.check(response)
            listed = wire.whole(response)
            names = listed.get("models") if isinstance(listed, dict) else None
            if not isinstance(names, list) or len(names) != 1:
                raise Incomplete(f"Name the model with --model: the server lists {names or 'none'}.")
            self._model = str(names[0])
        return self._model

    def query(self, text: str) -> float | None:
        """Ask Prometheus for one number; None when it has no data or does not answer."""
        try:
            response = self._http.get(
                f"{self._gates.prometheus_url.rstrip('/')}/api/v1/query", params={"query": text}, timeout=30
            )
            result = response.raise_for_status().json()["data"]["result"]
            return float(result[0]["value"][1]) if len(result) == 1 else None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return None


class _Busy(Failure):
    exit_code = 4


class _NotRouted(Failure):
    exit_code = 4


class _Unreachable(_NotRouted):
    """No connection, so no request."""
