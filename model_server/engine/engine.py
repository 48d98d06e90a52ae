"""The engine: requests in, tokens out, two lanes, one thread each.

The shared lane's thread repeats: drop who left, admit who waits, run one step (`shared_lane.py`). The own lane's
thread runs one `generate` call after another (`own_lane.py`). Owns the threads, who may wait, draining, and what
happens when a thread dies or hangs; knows no wire format.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from model_server.compute.runner import Runner
from model_server.engine import endings
from model_server.engine.batch import BatchLoop
from model_server.engine.fallback import GenerateFallback
from model_server.engine.idle import IdleTasks
from model_server.errors import BadRequest, Draining, EngineDead, QueueFull, ServeError, TimedOut
from model_server.request import Channel, Lane, Request

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Engine:
    """Generates for `Request`s; `submit` from the event loop, everything else happens in the engine's own threads."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int,
        max_queue_size: int,
        own_lane_tokens: int,
        prefill_tokens: int,
        whole_prompt_tokens: int,
        prefix_caching: bool,
        stall_s: float,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Make an engine around a model and the memory of its rows; call `start` after.

        Args:
            max_batch_size: rows that decode together.
            own_lane_tokens: KV memory of the own lane, in tokens: sequences times length of one call.
            prefill_tokens: prompt tokens read in one step at most.
            whole_prompt_tokens: the same while few rows decode, for prompts that the step completes.
            prefix_caching: take over what another request has read of a prompt.
            stall_s: a step longer than this counts as hung.
            on_death: told why, once, from the thread that noticed.
        """
        self.max_queue_size = max_queue_size
        self.dead: str | None = None
        self.accepting = True
        self._kv_cache = runner.kv_cache
        self._rate = endings.CompletionRate()
        self._shared = BatchLoop(
            runner,
            max_batch_size=max_batch_size,
            prefill_tokens=prefill_tokens,
            whole_prompt_tokens=whole_prompt_tokens,
            prefix_caching=prefix_caching,
            rate=self._rate,
            wake=self._wake,
        )
        self._own = GenerateFallback(runner.model, tokenizer, num_tokens=own_lane_tokens)
        self._on_death = on_death
        self._stall_s = stall_s
        self._stopping = False
        self._num_threads = torch.get_num_threads()
        self._shared_threads = 0
        self._pauses = IdleTasks(self._compilations(runner), self._shared.rest)
        self._own_lane_set = threading.Event()
        # Guards both waiting rooms, `_own.running` and the flags; rows belong to the shared lane's thread.
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy_since: dict[Lane, float | None] = {Lane.SHARED: None, Lane.OWN: None}
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._run_shared,), name="shared-lane", daemon=True),
            threading.Thread(target=self._guarded, args=(self._run_own,), name="own-lane", daemon=True),
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
        ]

    # --- the event loop's side ---------------------------------------------------------------------------------------

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Take the requests of one HTTP call, all or none.

        Raises:
            EngineDead, Draining: no request is taken any more.
            BadRequest: a request can never fit into the memory there is.
            QueueFull: more would wait than may.
        """
        self._loop = asyncio.get_running_loop()
        with self._changed:
            for request in requests:
                self._check_fits(request)
            self.check_open()
            own = sum(r.sampling.lane is Lane.OWN for r in requests)
            self._check_room([r.max_tokens for r in requests if r.sampling.lane is not Lane.OWN], own)
            for request in requests:
                lane = request.sampling.lane
                (self._own.waiting if lane is Lane.OWN else self._shared.scheduler.waiting).add(request)
            self._changed.notify_all()

    def check_open(self) -> None:
        """Raise if a request made now would be refused whatever it asks: to be asked before its prompt is tokenized."""
        if self.dead is not None:
            raise EngineDead("The engine has stopped; the server is about to be restarted.", retry_after_s=30)
        if not self.accepting:
            raise Draining("The server is shutting down; send the request again.", retry_after_s=1)
        with self._changed:
            self._forget_the_gone()
            self._check_room([1], 0)

    @property
    def running(self) -> int:
        return len(self._shared.requests) + (self._own.running is not None)

    @property
    def waiting(self) -> int:
        return len(self._shared.scheduler.waiting) + len(self._own.waiting)

    @property
    def kv_usage(self) -> float:
        """Return the share of the shared lane's KV memory that running requests have reserved, 0 to 1."""
        return sum(row.request.max_tokens for row in list(self._shared.scheduler.rows)) / self._kv_cache.num_tokens

    async def drain(self, seconds: float) -> None:
        """Take no new requests, let those here finish for up to `seconds`, then end what is left with an error."""
        self._loop = asyncio.get_running_loop()
        self.accepting = False
        deadline_s = time.monotonic() + seconds
        idle = asyncio.Event()

        def wait_for_idle() -> None:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.dead is not None or not (self.running or self.waiting),
                    timeout=max(0.0, deadline_s - time.monotonic()),
                )
            self._call_loop(idle.set)

        # A daemon thread and not the loop's executor: a drain that is given up must not hold the process.
        threading.Thread(target=wait_for_idle, name="drain", daemon=True).start()
        await idle.wait()
        self._fail_everything(Draining("The server shut down before the answer was complete.", retry_after_s=1))

    def stop(self) -> None:
        """End the threads after their current step."""
        with self._changed:
            self.accepting = False
            self._stopping = True
            self._changed.notify_all()

    def _check_fits(self, request: Request) -> None:
        if request.max_tokens > self._kv_cache.max_sequence_tokens:
            raise BadRequest(
                f"prompt and max_new_tokens together are {request.max_tokens} tokens; "
                f"this server holds {self._kv_cache.max_sequence_tokens}.",
                field="max_new_tokens",
            )
        if request.sampling.lane is Lane.OWN:
            self._own.check_fits(request)

    def _check_room(self, shared: Sequence[int], num_own: int) -> None:
        """Raise if requests of so many tokens each, and so many for the own lane, would make the line too long."""
        in_line = [request.max_tokens for request in self._shared.scheduler.waiting]
        places = min(self._shared.scheduler.num_free, self._kv_cache.num_allocatable([*in_line, *shared]))
        would_wait = max(0, len(in_line) + len(shared) - places)
        would_wait += max(0, len(self._own.waiting) + num_own - (self._own.running is None))
        if would_wait > self.max_queue_size:
            raise QueueFull(
                f"{self.waiting} requests are waiting and at most {self.max_queue_size} may.",
                retry_after_s=self._rate.seconds_until(self.waiting / 2),
            )

    def _forget_the_gone(self) -> None:
        """Remove waiting requests that nobody wants any more, or whose time is up; the lock is held."""
        now_s = time.monotonic()

        def gone(request: Request) -> bool:
            return request.channel.closed or (request.deadline_s is not None and now_s >= request.deadline_s)

        removed = self._shared.scheduler.waiting.remove_where(gone) + self._own.waiting.remove_where(gone)
        for request in removed:
            endings.fail(request, TimedOut("The request waited for its whole time; the server is too busy."))
        self._wake(removed)

    # --- the shared lane ---------------------------------------------------------------------------------------------

    def _run_shared(self) -> None:
        self._own_lane_set.wait()  # the last to say so decides for MKL, which has one number for the whole process
        while True:
            with self._changed:
                woken = self._changed.wait_for(
                    lambda: self._stopping or self._shared.scheduler.rows or self._shared.scheduler.waiting,
                    timeout=self._pauses.wait_s,
                )
                if self._stopping:
                    return
                self._forget_the_gone()
            if not woken:
                if self._own.running is None:
                    self._pauses.use()
                else:
                    self._pauses.worked()
                continue
            self._shared.drop_the_gone()
            self._shared.admit(self._changed)
            if self._shared.scheduler.rows:
                self._busy_since[Lane.SHARED] = time.monotonic()
                self._computing_with(self._threads_for_shared(), self._shared.step)
                self._busy_since[Lane.SHARED] = None
            if not self._shared.scheduler.rows:
                with self._changed:
                    self._changed.notify_all()
            self._pauses.worked()

    def _compilations(self, runner: Runner) -> Iterator[Callable[[], None]]:
        """Compile each of the runner's matmuls for the threads of a step alone, and of one beside the own lane."""
        for num_threads in sorted({self._num_threads, max(1, self._num_threads - 1)}, reverse=True):
            for compile_matmul in runner.compilations():
                yield functools.partial(self._computing_with, num_threads, compile_matmul)

    def _computing_with(self, num_threads: int, work: Callable[[], T]) -> T:
        """Return what the shared lane's work returns, done with so many threads."""
        if num_threads != self._shared_threads:
            self._shared_threads = num_threads
            _compute_with(num_threads)
        return work()

    def _threads_for_shared(self) -> int:
        """Return all threads, less the own lane's while it works: a step waits for the slowest of its threads."""
        return self._num_threads if self._own.running is None else max(1, self._num_threads - 1)

    # --- the own lane ------------------------------------------------------------------------------------------------

    def _run_own(self) -> None:
        # On a CPU the lanes share the cores, and one is this lane's share: a second team of OpenMP threads would make
        # more of them than cores, and slow every step of the shared lane down even while this one is idle.
        _compute_with(1)
        self._own_lane_set.set()
        while True:
            with self._changed:
                self._own.running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or self._own.waiting)
                if self._stopping:
                    return
                self._forget_the_gone()
                self._own.running = request = self._own.waiting.pop()
            if request is not None:
                self._tick(Lane.OWN)
                self._own.answer(
                    request, wake=functools.partial(self._wake, [request]), tick=lambda: self._tick(Lane.OWN)
                )
                self._busy_since[Lane.OWN] = None
                self._rate.note()

    # --- endings and faults ------------------------------------------------------------------------------------------

    def _tick(self, lane: Lane) -> None:
        """Note that a lane is at work; the own lane's line is looked after meanwhile, as the other lane may sleep."""
        self._busy_since[lane] = time.monotonic()
        if self._own.waiting:
            with self._changed:
                self._forget_the_gone()

    def _fail_everything(self, error: ServeError) -> None:
        """End whatever is running or waiting with an error; callable from any thread."""
        with self._changed:
            requests = self._shared.scheduler.waiting.remove_where(lambda r: True)
            requests += self._own.waiting.remove_where(lambda r: True)
            if self._own.running is not None:
                requests.append(self._own.running)
        requests += self._shared.requests
        for request in requests:
            endings.fail(request, error)
        self._wake(requests)

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            logger.exception("the %s thread died", threading.current_thread().name)
            self._die(f"the {threading.current_thread().name} thread died: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        """Notice a step that hangs: a thread cannot be ended from outside, so the process is declared dead."""
        while not self._stopping and self.dead is None:
            now_s = time.monotonic()
            for lane, since_s in self._busy_since.items():
                if since_s is not None and now_s - since_s > self._stall_s:
                    self._die(f"a step of the {lane} lane has taken more than {self._stall_s:g} s")
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self.dead, timeout=self._stall_s / 4)

    def _die(self, reason: str) -> None:
        with self._changed:
            if self.dead is not None:
                return
            self.dead = reason
            self.accepting = False
            self._changed.notify_all()
        logger.critical("the engine is dead: %s", reason)
        self._on_death(reason)
        self._fail_everything(EngineDead("The engine stopped while it worked on the request; send it again."))

    def _wake(self, requests: Iterable[Request]) -> None:
        """Let the readers of these requests look at what was sent: one call into the event loop for all of them."""
        channels = [request.channel for request in requests]
        if channels:
            self._call_loop(_wake_all, channels)

    def _call_loop(self, function: Callable[..., object], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _compute_with(num_threads: int) -> None:
    """Let the calling thread compute with so many.

    At its first parallel work a thread takes the number that any thread set last, over the one it had set itself.
    Asking for the number counts as that work; what is set afterwards stays (`lazy_init_num_threads`, ATen/Parallel.h).
    """
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


def _wake_all(channels: Iterable[Channel]) -> None:
    for channel in channels:
        channel.wake()
