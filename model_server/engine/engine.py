"""The engine: accepts requests in the event loop, generates in its own threads, and drains.

The batch thread runs the step loop (`batch.py`; on an accelerator, `overlap.py`). The fallback thread runs one
`model.generate` call at a time (`unbatched/fallback.py`). The engine knows no wire format.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedTokenizerBase

from model_server.compute.cpu.threads import ThreadCounts
from model_server.compute.gpu.streams import batch_stream, fallback_stream
from model_server.compute.runner import Runner
from model_server.engine.batch import BatchLoop
from model_server.engine.config import EngineConfig
from model_server.engine.idle import IdleTasks
from model_server.engine.outputs.output import finish_with_error
from model_server.engine.outputs.readers import Readers
from model_server.engine.overlap import OverlappedBatchLoop
from model_server.engine.scheduling.limits import CompletionRate, SubmissionLimits
from model_server.engine.scheduling.queues import RequestQueues
from model_server.engine.step_watchdog import Watchdog
from model_server.engine.unbatched.batchable import can_batch
from model_server.engine.unbatched.fallback import GenerateFallback
from model_server.errors import Draining, EngineDead, ServeError
from model_server.request import Request

logger = logging.getLogger(__name__)


class Engine:
    """Generates the output of `Request`s. Call `submit` and `drain` in the event loop."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Make an engine; `start` starts its threads. If the engine dies, it calls `on_death` once with the reason."""
        self.dead: str | None = None
        self.accepting = True
        self.runner = runner
        self._readers = Readers()
        self._completions = CompletionRate()
        self.batch = (OverlappedBatchLoop if runner.is_async else BatchLoop)(
            runner, config, wake=self._readers.wake, on_release=self._completions.note, clock=clock
        )
        self.fallback = GenerateFallback(runner.model, tokenizer, max_tokens=config.max_fallback_tokens)
        self._queues = RequestQueues(self.batch.scheduler.waiting, self.fallback.waiting)
        self._limits = SubmissionLimits(
            config.max_queue_size, self._queues, self.batch, self.fallback, self._completions
        )
        self._threads = ThreadCounts()
        self._idle_tasks = IdleTasks(
            self._threads.compile_tasks(runner),
            self.batch.release_memory,
            once_after_s=config.compile_after_s,
            release_after_s=config.release_memory_after_s,
        )
        self._watchdog = Watchdog(config.stall_s, self._die)
        self._clock = clock
        self._on_death = on_death
        self._stopping = False
        # Guards both queues, `fallback.running` and the flags. Only the batch thread changes the batch.
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._guarded, args=(self._run_batch, batch_stream), name="batch", daemon=True),
            threading.Thread(
                target=self._guarded, args=(self._run_fallback, fallback_stream), name="fallback", daemon=True
            ),
            threading.Thread(target=self._watchdog.run, name="watchdog", daemon=True),
        ]

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept the requests of one HTTP call, all or none.

        Raises:
            EngineDead, Draining: the engine accepts no requests.
            BadRequest: a request can never be generated here: it needs too much memory, or its parameters conflict.
            QueueFull: the requests would exceed `max_queue_size`.
        """
        self._readers.attach()
        batched = [request for request in requests if can_batch(request.sampling)]
        unbatched = [request for request in requests if request not in batched]
        with self._changed:
            self._limits.check_fits(batched, unbatched)
            self.ensure_accepting()
            self._limits.check_queue([request.max_tokens for request in batched], len(unbatched))
            self._queues.append(batched, unbatched)
            self._changed.notify_all()

    def ensure_accepting(self) -> None:
        """Raise the error with which `submit` would refuse any request now; call it before tokenizing a prompt."""
        if self.dead is not None:
            raise EngineDead("The engine has stopped; the server will be restarted.", retry_after_s=30)
        if not self.accepting:
            raise Draining("The server is shutting down; send the request again.", retry_after_s=1)
        with self._changed:
            self._purge_queues()
            self._limits.check_queue([1])

    @property
    def running(self) -> int:
        return len(self.batch.requests) + (self.fallback.running is not None)

    @property
    def waiting(self) -> int:
        return len(self._queues)

    @property
    def kv_usage(self) -> float:
        return self.batch.kv_usage

    async def drain(self, seconds: float) -> None:
        """Stop accepting requests, wait up to `seconds` for the accepted ones, and end the rest with an error."""
        self._readers.attach()
        self.accepting = False
        deadline_s = time.monotonic() + seconds
        idle = asyncio.Event()

        def wait_for_idle() -> None:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.dead is not None or not (self.running or self.waiting),
                    timeout=max(0.0, deadline_s - time.monotonic()),
                )
            self._readers.call(idle.set)

        # A daemon thread, not the loop's executor: an abandoned drain must not keep the process alive.
        threading.Thread(target=wait_for_idle, name="drain", daemon=True).start()
        await idle.wait()
        self._fail_everything(Draining("The server shut down before the answer was complete.", retry_after_s=1))

    def stop(self) -> None:
        """End the threads after their current step."""
        self._watchdog.stop()
        with self._changed:
            self.accepting = False
            self._stopping = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait until the threads have ended."""
        for worker in self._workers:
            worker.join(timeout_s)

    def _run_batch(self) -> None:
        self._threads.enter_batch()
        scheduler = self.batch.scheduler
        while True:
            with self._changed:
                has_work = self._changed.wait_for(
                    lambda: self._stopping or scheduler.sequences or scheduler.waiting,
                    timeout=self._idle_tasks.wait_s,
                )
                if self._stopping:
                    return
                self._purge_queues()
            if has_work:
                self._run_step()
            elif self.fallback.running is None:
                self._idle_tasks.run_next()
                continue
            self._idle_tasks.touch()

    def _run_step(self) -> None:
        self.batch.reap()
        self.batch.admit(self._changed)
        if self.batch.scheduler.sequences:
            self._watchdog.start("batch")
            self._threads.before_step(self.fallback.running is not None)
            self.batch.step()
            self._watchdog.end("batch")
        if not self.batch.scheduler.sequences:
            with self._changed:
                self._changed.notify_all()

    def _run_fallback(self) -> None:
        self._threads.enter_fallback()
        while True:
            with self._changed:
                self.fallback.running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or self.fallback.waiting)
                if self._stopping:
                    return
                self._purge_queues()
                self.fallback.running = request = self.fallback.waiting.pop()
            if request is not None:
                request.admitted_s = time.monotonic()
                self._on_fallback_step()
                self.fallback.generate(
                    request, wake=functools.partial(self._readers.wake, [request]), on_step=self._on_fallback_step
                )
                self._watchdog.end("fallback")
                self._completions.note()

    def _on_fallback_step(self) -> None:
        self._watchdog.start("fallback")
        if self.fallback.waiting:  # the batch thread purges the queues too, but may be asleep
            with self._changed:
                self._purge_queues()

    def _purge_queues(self) -> None:
        """Remove waiting requests that were cancelled or have passed their deadline; the caller holds the lock."""
        self._readers.wake(self._queues.purge(self._clock()))

    def _fail_everything(self, error: ServeError) -> None:
        """End all running and waiting requests with an error; callable from any thread."""
        with self._changed:
            requests = self._queues.remove_where(lambda request: True)
            if self.fallback.running is not None:
                requests.append(self.fallback.running)
        requests += self.batch.requests
        for request in requests:
            finish_with_error(request, error)
        self._readers.wake(requests)

    def _guarded(
        self, run: Callable[[], None], stream: Callable[[torch.device], AbstractContextManager[object]]
    ) -> None:
        try:
            with stream(self.runner.model.device):
                run()
        except BaseException as error:
            name = threading.current_thread().name
            logger.exception("the %s thread died", name)
            self._die(f"the {name} thread died: {type(error).__name__}: {error}")

    def _die(self, reason: str) -> None:
        with self._changed:
            if self.dead is not None:
                return
            self.dead = reason
            self.accepting = False
            self._changed.notify_all()
        self._watchdog.stop()
        logger.critical("the engine is dead: %s", reason)
        self._on_death(reason)
        self._fail_everything(EngineDead("The engine stopped while it worked on the request; send it again."))
