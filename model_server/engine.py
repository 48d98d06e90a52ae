"""The engine: requests in, tokens out, two lanes, one thread each.

The shared lane's thread repeats: drop who left, admit who waits, run one step, hand out its tokens. The own lane's
thread runs one `generate` call after another. Owns threads, admission, endings and faults; knows no wire format, and
of text only that a detokenizer says when to stop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from . import journal
from .errors import (
    BadRequest,
    Draining,
    EngineDead,
    InternalError,
    OutOfMemory,
    QueueFull,
    ServeError,
    TimedOut,
)
from .generation import generate
from .memory import Segment
from .request import Channel, Chunk, Final, FinishReason, Lane, PromptTokens, Request, Token
from .runner import Runner
from .sampling import row_sampler, sample, with_logprobs
from .scheduler import Row, Scheduler, WaitingRoom, newest_first

logger = logging.getLogger(__name__)


Work = list[tuple[Row, int]]
"""A step: rows with the number of their tokens it computes. Decoding rows come first, with one token each."""


def _sampled(work: Work) -> list[Row]:
    """Return the rows that get a token from a step: those that decode, and those whose prompt it completes."""
    return [row for row, count in work if row.decoding or count == row.num_unread]


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
        stall_s: float,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Make an engine around a model and the memory of its rows; call `start` after.

        Args:
            max_batch_size: rows that decode together.
            own_lane_tokens: KV memory of the own lane, in tokens: sequences times length of one call.
            prefill_tokens: prompt tokens read in one step at most.
            stall_s: a step longer than this counts as hung.
            on_death: told why, once, from the thread that noticed.
        """
        self.max_queue_size = max_queue_size
        self.own_lane_tokens = own_lane_tokens
        self.dead: str | None = None
        self.accepting = True
        self._model = runner.model
        self._tokenizer = tokenizer
        self._runner = runner
        self._memory = runner.memory
        self._scheduler = Scheduler(max_batch_size=max_batch_size, prefill_tokens=prefill_tokens)
        self._own_waiting = WaitingRoom()
        self._own_running: Request | None = None
        self._randomness = torch.Generator(runner.model.device)
        self._randomness.seed()
        self._on_death = on_death
        self._stall_s = stall_s
        self._stopping = False
        self._num_threads = torch.get_num_threads()
        self._own_lane_set = threading.Event()
        # Guards both waiting rooms, `_own_running` and the flags; rows belong to the shared lane's thread.
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy_since: dict[Lane, float | None] = {Lane.SHARED: None, Lane.OWN: None}
        self._endings: deque[float] = deque(maxlen=32)
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
                (self._own_waiting if lane is Lane.OWN else self._scheduler.waiting).add(request)
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
        return len(self._scheduler.rows) + (self._own_running is not None)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting) + len(self._own_waiting)

    @property
    def kv_usage(self) -> float:
        """Return the share of the shared lane's KV memory that running requests have reserved, 0 to 1."""
        return sum(row.request.max_tokens for row in list(self._scheduler.rows)) / self._memory.num_tokens

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
        if request.max_tokens > self._memory.max_row_tokens:
            raise BadRequest(
                f"prompt and max_new_tokens together are {request.max_tokens} tokens; "
                f"this server holds {self._memory.max_row_tokens}.",
                field="max_new_tokens",
            )
        if request.sampling.lane is Lane.OWN:
            sequences = max(request.sampling.generate.get("num_beams") or 1, request.sampling.num_answers)
            needed = sequences * request.max_tokens
            if needed > self.own_lane_tokens:
                raise BadRequest(
                    f"{sequences} sequences of {request.max_tokens} tokens need {needed} tokens of memory; "
                    f"this server has {self.own_lane_tokens} for one such request. Ask for fewer beams or tokens.",
                    field="num_beams" if sequences > 1 else "max_new_tokens",
                )

    def _check_room(self, shared: Sequence[int], num_own: int) -> None:
        """Raise if requests of so many tokens each, and so many for the own lane, would make the line too long."""
        in_line = [request.max_tokens for request in self._scheduler.waiting]
        places = min(self._scheduler.num_free, self._memory.num_fitting([*in_line, *shared]))
        would_wait = max(0, len(in_line) + len(shared) - places)
        would_wait += max(0, len(self._own_waiting) + num_own - (self._own_running is None))
        if would_wait > self.max_queue_size:
            raise QueueFull(
                f"{self.waiting} requests are waiting and at most {self.max_queue_size} may.",
                retry_after_s=self._seconds_until_room(),
            )

    def _seconds_until_room(self) -> int:
        """Estimate from the recent rate of endings when half the line will have gone."""
        if len(self._endings) < 2:
            return 5
        rate = len(self._endings) / max(0.1, time.monotonic() - self._endings[0])
        return max(1, min(60, math.ceil(self.waiting / 2 / rate)))

    def _forget_the_gone(self) -> None:
        """Remove waiting requests that nobody wants any more, or whose time is up; the lock is held."""
        now_s = time.monotonic()

        def gone(request: Request) -> bool:
            return request.channel.closed or (request.deadline_s is not None and now_s >= request.deadline_s)

        removed = self._scheduler.waiting.remove_where(gone) + self._own_waiting.remove_where(gone)
        for request in removed:
            self._fail(request, TimedOut("The request waited for its whole time; the server is too busy."))
        self._wake(removed)

    # --- the shared lane ---------------------------------------------------------------------------------------------

    def _run_shared(self) -> None:
        self._own_lane_set.wait()  # the last to say so decides for MKL, which has one number for the whole process
        _compute_with(self._num_threads)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._scheduler.rows or self._scheduler.waiting,
                    timeout=None,
                )
                if self._stopping:
                    return
                self._forget_the_gone()
            touched = self._drop_the_gone()
            touched += self._admit()
            if self._scheduler.rows:
                self._busy_since[Lane.SHARED] = time.monotonic()
                touched += self._step()
                self._busy_since[Lane.SHARED] = None
            self._wake(touched)
            if not self._scheduler.rows:
                self._memory.trim()
                with self._changed:
                    self._changed.notify_all()

    def _drop_the_gone(self) -> list[Request]:
        """End rows whose client left, whose time is up, or that another thread has ended."""
        now_s = time.monotonic()
        dropped = []
        for row in list(self._scheduler.rows):
            request, limit_s = row.request, row.sampler.max_time_s
            if request.cancelled or request.channel.ended:
                self._leave(row)
                if not request.channel.ended:  # else whoever ended it has written its line
                    journal.ended(request, "cancelled")
            elif (request.deadline_s is not None and now_s >= request.deadline_s) or (
                limit_s is not None and now_s - row.started_s >= limit_s
            ):
                self._finish(row, FinishReason.LENGTH)
                dropped.append(request)
        return dropped

    def _admit(self) -> list[Request]:
        """Give free places to waiting requests; return those that could not start after all."""
        failed = []
        while self._scheduler.num_free:
            # Under the lock from the line to the place: a drain that looked in between would find nobody here.
            with self._changed:
                request = self._scheduler.next_request(self._fits)
                if request is None:
                    break
                try:
                    sampler = row_sampler(self._model, request.prompt_ids, request.sampling)
                except ServeError as error:
                    self._fail(request, error)
                    failed.append(request)
                    continue
                place = self._memory.take(request.max_tokens)
                assert place is not None, "it fitted a moment ago, and only this thread takes"
                self._scheduler.rows.append(Row(request, place, sampler, started_s=time.monotonic()))
        return failed

    def _fits(self, request: Request) -> bool:
        return self._memory.num_fitting([request.max_tokens]) == 1

    def _step(self) -> list[Request]:
        """Run one step and hand out its tokens; return the requests that have news."""
        work: Work = [(row, 1) for row in self._scheduler.rows if row.decoding]
        work += self._scheduler.plan_prefill()
        try:
            self._compute(work)
        except (torch.OutOfMemoryError, MemoryError):
            self._shed()
        return [row.request for row, _ in work]

    def _shed(self) -> None:
        """Out of memory: the newest row goes, the others try again without it."""
        row = newest_first(self._scheduler.rows)[0]
        logger.warning("out of memory in a step of %d rows: shed the newest", len(self._scheduler.rows))
        self._fail(row.request, OutOfMemory("The server ran out of memory; send the request again later."))
        self._leave(row)
        self._wake([row.request])
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(self, work: Work) -> None:
        """Run a step; if it fails, halve it until the row that makes it fail is alone, and end that one.

        Nothing is changed before a step has succeeded, so its halves can be run again.
        """
        try:
            logits, picked = self._forward(work)
        except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError):
            # No memory: the caller sheds. A broken accelerator stays broken: the thread dies, the kubelet restarts us.
            raise
        except Exception:
            if len(work) > 1:
                self._compute(work[: len(work) // 2])
                self._compute(work[len(work) // 2 :])
                return
            row, _ = work[0]
            logger.exception("request %s failed in its step", row.request.request_id)
            self._fail(row.request, InternalError())
            self._leave(row)
            return
        self._hand_out(work, logits, picked)

    def _forward(self, work: Work) -> tuple[torch.Tensor, list[int | ServeError]]:
        """Return the logits of the step and the tokens picked from them.

        The logits' rows: one for each row that gets a token (`_sampled`), then, for each row that wants its prompt's
        log-probabilities, one for each of its tokens read in this step.
        """
        decode, prefill = [], []
        wanted: list[int] = []
        of_prompts: list[int] = []
        at = 0
        for row, count in work:
            request = row.request
            if row.decoding:
                position = request.num_prompt_tokens + len(row.answer_ids) - 1
                decode.append(Segment(row.place, position, row.answer_ids[-1:]))
            else:
                prefill.append(
                    Segment(row.place, row.num_read, request.prompt_ids[row.num_read : row.num_read + count])
                )
                if request.sampling.prompt_logprobs:
                    of_prompts += range(at, at + count)
            at += count
            if row.decoding or count == row.num_unread:
                wanted.append(at - 1)
        logits = self._runner.forward(decode, prefill, wanted + of_prompts)
        picked = sample(logits[: len(wanted)], [row.sampler for row in _sampled(work)], self._randomness)
        return logits, picked

    def _hand_out(self, work: Work, logits: torch.Tensor, picked: Sequence[int | ServeError]) -> None:
        sampled = _sampled(work)
        at = len(sampled)
        for row, count in work:
            if not row.decoding:
                if row.request.sampling.prompt_logprobs:
                    self._send_prompt_tokens(row, count, logits[at : at + count])
                    at += count
                row.num_read += count
        for i, (row, token) in enumerate(zip(sampled, picked, strict=True)):
            if isinstance(token, ServeError):
                self._fail(row.request, token)
                self._leave(row)
            else:
                self._take_token(row, token, logits[i : i + 1])

    def _take_token(self, row: Row, token_id: int, logits: torch.Tensor) -> None:
        request, sampling = row.request, row.request.sampling
        row.answer_ids.append(token_id)
        row.sampler.note(token_id)
        journal.token(request)
        detokenizer = request.detokenizers[0]
        text = detokenizer.push(token_id)
        tokens: tuple[Token, ...] = ()
        if sampling.logprobs is not None:
            tokens = tuple(with_logprobs(logits, [token_id], sampling.logprobs))
        if text or tokens:
            request.channel.send(Chunk(text, tokens=tokens))
        if token_id in row.sampler.eos_token_ids or detokenizer.stopped:
            self._finish(row, FinishReason.STOP)
        elif len(row.answer_ids) == sampling.max_new_tokens:
            self._finish(row, FinishReason.LENGTH)

    def _send_prompt_tokens(self, row: Row, count: int, logits: torch.Tensor) -> None:
        """Send the log-probabilities of the prompt tokens that follow those just read."""
        request, start = row.request, row.num_read
        following = request.prompt_ids[start + 1 : start + count + 1]
        num_top = request.sampling.logprobs or 0
        tokens = with_logprobs(logits[: len(following)], following, num_top) if following else []
        if start == 0:
            tokens.insert(0, Token(request.prompt_ids[0]))
        request.channel.send(PromptTokens(tuple(tokens)))

    def _finish(self, row: Row, reason: FinishReason) -> None:
        request = row.request
        detokenizer = request.detokenizers[0]
        text = detokenizer.flush()
        if text:
            request.channel.send(Chunk(text))
        if detokenizer.stopped:  # the last of the text can complete a stop string
            reason = FinishReason.STOP
        request.channel.send(Final(reason, request.num_prompt_tokens, len(row.answer_ids)))
        self._leave(row)
        journal.ended(request, reason.value)

    def _leave(self, row: Row) -> None:
        self._scheduler.rows.remove(row)
        self._memory.give_back(row.place)
        self._endings.append(time.monotonic())

    # --- the own lane ------------------------------------------------------------------------------------------------

    def _run_own(self) -> None:
        # On a CPU the lanes share the cores, and one is this lane's share: a second team of OpenMP threads would make
        # more of them than cores, and slow every step of the shared lane down even while this one is idle.
        _compute_with(1)
        self._own_lane_set.set()
        while True:
            with self._changed:
                self._own_running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or self._own_waiting)
                if self._stopping:
                    return
                self._forget_the_gone()
                self._own_running = request = self._own_waiting.pop()
            if request is not None:
                self._tick(Lane.OWN)
                self._generate(request)
                self._busy_since[Lane.OWN] = None
                self._endings.append(time.monotonic())

    def _generate(self, request: Request) -> None:
        try:
            reason = generate(
                self._model,
                self._tokenizer,
                request,
                wake=lambda: self._wake([request]),
                tick=lambda: self._tick(Lane.OWN),
            )
        except ServeError as error:
            self._fail(request, error)
        except (torch.OutOfMemoryError, MemoryError):
            self._fail(request, OutOfMemory("The server ran out of memory; send the request again later."))
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("request %s failed in generate", request.request_id)
            self._fail(request, InternalError())
        else:
            if reason is not None:
                journal.ended(request, "cancelled" if request.cancelled else reason.value)
        self._wake([request])

    # --- endings and faults ------------------------------------------------------------------------------------------

    def _tick(self, lane: Lane) -> None:
        """Note that a lane is at work; the own lane's line is looked after meanwhile, as the other lane may sleep."""
        self._busy_since[lane] = time.monotonic()
        if self._own_waiting:
            with self._changed:
                self._forget_the_gone()

    def _fail(self, request: Request, error: ServeError) -> None:
        if not request.channel.ended:
            request.channel.send(error)
            journal.ended(request, "cancelled" if request.cancelled else error.code)

    def _fail_everything(self, error: ServeError) -> None:
        """End whatever is running or waiting with an error; callable from any thread."""
        with self._changed:
            requests = self._scheduler.waiting.remove_where(lambda r: True)
            requests += self._own_waiting.remove_where(lambda r: True)
            if self._own_running is not None:
                requests.append(self._own_running)
        requests += [row.request for row in list(self._scheduler.rows)]
        for request in requests:
            self._fail(request, error)
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
