"""The shared lane: the rows that decode together, one step of theirs after the other.

Owns who has a place, what a step computes and what becomes of its tokens, and whom a fault of a step ends. Used by one
thread alone; what it shares with others (the line) is locked by the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from model_server.compute.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner
from model_server.compute.sampling import SampledTokens, sample, sequence_sampler, with_logprobs
from model_server.engine import endings, output
from model_server.engine.output import PendingToken
from model_server.engine.prefix_cache import MIN_TOKENS, PrefixCache, num_common
from model_server.engine.scheduler import Scheduler, Sequence, by_arrival_desc
from model_server.errors import InternalError, OutOfMemory, ServeError
from model_server.request import FinishReason, Request, Token
from model_server.telemetry import request_log

logger = logging.getLogger(__name__)

Work = list[tuple[Sequence, int]]
"""A step: rows with the number of their tokens it computes. Decoding rows come first, with one token each."""


def _sampled(work: Work) -> list[Sequence]:
    """Return the rows that get a token from a step: those that decode, and those whose prompt it completes."""
    return [row for row, count in work if row.decoding or count == row.num_unread]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens nobody has read."""

    work: Work
    logits: torch.Tensor
    """For each row that gets a token (`_sampled`) one, then one for each prompt token whose log-probability is wanted.
    """
    picked: SampledTokens


class BatchLoop:
    """Rows over one runner.

    On an accelerator the host does its part of a step while the next one computes. Where all rows decode, and none of
    them needs to know its last token to pick the next, a step is launched before the tokens of the one before are read:
    it finds them on the device. Where that cannot be, a step ends when its tokens are known, not when they are told:
    what a reader needs of them (text, stop strings, log lines, the event loop's wake-up) is made after the next launch.
    A row that ends by its text or by an end-of-sequence token is then part of one step more, whose token for it nobody
    takes.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_size: int,
        prefill_tokens: int,
        whole_prompt_tokens: int,
        prefix_caching: bool,
        rate: endings.CompletionRate,
        wake: Callable[[Iterable[Request]], None],
    ) -> None:
        """Make the lane; `wake` lets the readers of requests look at what was sent."""
        self.runner = runner
        self.scheduler = Scheduler(
            max_batch_size=max_batch_size, prefill_tokens=prefill_tokens, whole_prompt_tokens=whole_prompt_tokens
        )
        self._kv_cache = runner.kv_cache
        self._prefixes = PrefixCache()
        self._prefix_caching = prefix_caching
        self._rate = rate
        self._wake = wake
        self._untold: list[PendingToken] = []
        self._under_way: Launched | None = None
        self._randomness = torch.Generator(runner.model.device)
        self._randomness.seed()

    @property
    def requests(self) -> list[Request]:
        """The requests in this lane's hands that have no ending yet; callable from any thread."""
        rows = [*self.scheduler.rows, *(untold.row for untold in [*self._untold])]
        return list(dict.fromkeys(row.request for row in rows))

    def drop_the_gone(self) -> None:
        """End rows whose client left, whose time is up, or that another thread has ended."""
        now_s = time.monotonic()
        gone = [row for row in self.scheduler.rows if _is_unwanted(row) or _is_late(row, now_s)]
        if gone:
            self._tell()
        for row in gone:
            if row.left:
                continue
            if not _is_unwanted(row):
                output.end(row, FinishReason.LENGTH)
                self._wake([row.request])
            elif not row.request.channel.ended:  # else whoever ended it has written its line
                request_log.ended(row.request, "cancelled")
            self._leave(row)

    def admit(self, lock: AbstractContextManager[object]) -> None:
        """Give free places to waiting requests, or an error to those that cannot start after all."""
        while self.scheduler.num_free:
            # Under the lock from the line to the place: a drain that looked in between would find nobody here.
            with lock:
                request = self.scheduler.next_request(self._fits)
                if request is None:
                    break
                try:
                    sampler = sequence_sampler(self.runner.model, request.prompt_ids, request.sampling)
                except ServeError as error:
                    self._fail(request, error)
                    continue
                place = self._kv_cache.allocate(request.max_tokens)
                assert place is not None, "it fitted a moment ago, and only this thread takes"
                self.scheduler.rows.append(Sequence(request, place, sampler, started_s=time.monotonic()))

    def _fits(self, request: Request) -> bool:
        return self._kv_cache.num_allocatable([request.max_tokens]) == 1

    def step(self) -> None:
        """Run one step for all rows, or end the one that is under way and leave the next one so."""
        if self._under_way is not None:
            self._go_on(self._under_way)
        else:
            work: Work = [(row, 1) for row in self.scheduler.rows if row.decoding]
            work += self._plan_prefill()
            try:
                self._compute(work)
            except (torch.OutOfMemoryError, MemoryError):
                self._shed()
        if self._under_way is not None or not (self.runner.is_async and self.scheduler.rows):
            self._tell()

    def rest(self) -> None:
        """Hand back memory that nothing runs in, and with it what was kept there; call when there are no rows."""
        if self._kv_cache.release_unused():
            self._prefixes.clear()

    def _plan_prefill(self) -> Work:
        """Return what the step reads of which prompts; a row that comes to be read is looked up first."""
        waiting: set[Sequence] = set()
        while True:
            work = self.scheduler.plan_prefill(waiting)
            new = [row for row, _ in work if not row.begun]
            if not new:
                return work
            for row in new:
                source, count = self._cached(row)
                if self._is_being_read(row, count, [other for other, _ in work if other.begun]):
                    waiting.add(row)
                else:
                    self._begin(row, source, count)

    def _cached(self, row: Sequence) -> tuple[int, int]:
        """Return where other rows have left the beginning of this row's prompt, and how many tokens of it."""
        if self._may_share(row):
            # The last token is always read, for its logits.
            source, count = self._prefixes.longest(row.request.prompt_ids[:-1], row.place)
            if count >= MIN_TOKENS:
                return source, count
        return row.place, 0

    def _may_share(self, row: Sequence) -> bool:
        # Read in other pieces, a prompt is rounded otherwise in 16 bits: one with a seed asks for the same text again.
        sampling = row.request.sampling
        return self._prefix_caching and sampling.seed is None and not sampling.prompt_logprobs

    def _is_being_read(self, row: Sequence, num_cached: int, reading: Collection[Sequence]) -> bool:
        """Say whether waiting for another row, which is reading the same, saves half a step's reading or more."""
        enough = num_cached + self.scheduler.prefill_tokens // 2
        prompt_ids = row.request.prompt_ids[:-1]
        return self._may_share(row) and any(
            num_common(other.request.prompt_ids, prompt_ids) >= enough for other in reading
        )

    def _begin(self, row: Sequence, source: int, num_cached: int) -> None:
        """Have a row's prompt read, after what others have read of it."""
        row.begun = True
        row.num_read = row.request.num_cached = num_cached
        if source != row.place:
            self._kv_cache.copy(source, row.place, num_cached)
        self._prefixes.forget(row.place, row.request.max_tokens)
        self._hold(row)

    def _hold(self, row: Sequence) -> None:
        """Note whose keys and values a row has written: all but those of its last token."""
        if self._prefix_caching:
            self._prefixes.hold(row.place, [*row.request.prompt_ids[: row.num_read], *row.answer_ids[:-1]])

    def _shed(self) -> None:
        """Out of memory: the newest row goes, the others try again without it."""
        self._tell()
        logger.warning("out of memory in a step of %d rows: shed the newest", len(self.scheduler.rows))
        for row in by_arrival_desc(self.scheduler.rows)[:1]:
            self._fail(row.request, OutOfMemory("The server ran out of memory; send the request again later."))
            self._leave(row)
        if self.runner.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(self, work: Work) -> None:
        """Run a step; if it fails, halve it until the row that makes it fail is alone, and end that one.

        Nothing is changed before a step has succeeded, so its halves can be run again.
        """
        try:
            launched = self._launch(work)
            picked = None if self._may_stay_under_way(launched) else launched.picked.read()
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
            self._tell()
            if not row.left:
                self._fail(row.request, InternalError())
                self._leave(row)
            return
        if picked is None:
            self._under_way = launched
        else:
            self._hand_out(launched, picked)

    def _may_stay_under_way(self, launched: Launched) -> bool:
        """Say whether a step's tokens can be left unread until the next one is launched."""
        return (
            self.runner.is_async
            and launched.picked.on_device is not None
            and len(launched.work) == len(self.scheduler.rows)  # not a half of a step that failed
            and all(
                row.decoding and row.sampler.can_run_ahead and row.request.sampling.logprobs is None
                for row, _ in launched.work
            )
        )

    def _go_on(self, before: Launched) -> None:
        """Launch the step after one that is under way, if it can do without its tokens; then read and take those.

        A launch that fails is left: with the tokens known the same step is run again, and fails where that is answered.
        """
        self._under_way, following = None, None
        try:
            following = self._launch_after(before)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.debug("a step could not be launched before the last one was read", exc_info=True)
        picked = before.picked.read()
        self._under_way = following
        self._hand_out(before, picked)

    def _launch_after(self, before: Launched) -> Launched | None:
        """Launch a step for the rows that surely go on after another one; None where there are others, or no rows."""
        tokens = before.picked.on_device
        going = [i for i, (row, _) in enumerate(before.work) if not row.left and row.num_to_come > 1]
        if tokens is None or not going or not all(row.decoding for row in self.scheduler.rows):
            return None
        if len(going) < len(before.work):
            tokens = tokens[to_device(going, tokens.device)]
        rows = [before.work[i][0] for i in going]
        decode = [TokenRange(row.place, row.num_written + 1, [0]) for row in rows]
        logits = self.runner.forward(decode, [], range(len(rows)), tokens)
        picked = sample(logits, [row.sampler for row in rows], self._randomness)
        return Launched([(row, 1) for row in rows], logits, picked)

    def _launch(self, work: Work) -> Launched:
        """Launch a step whose rows' tokens are all known."""
        decode, prefill = [], []
        wanted: list[int] = []
        of_prompts: list[int] = []
        at = 0
        for row, count in work:
            request = row.request
            if row.decoding:
                decode.append(TokenRange(row.place, row.num_written, row.answer_ids[-1:]))
            else:
                prefill.append(
                    TokenRange(row.place, row.num_read, request.prompt_ids[row.num_read : row.num_read + count])
                )
                if request.sampling.prompt_logprobs:
                    of_prompts += range(at, at + count)
            at += count
            if row.decoding or count == row.num_unread:
                wanted.append(at - 1)
        logits = self.runner.forward(decode, prefill, wanted + of_prompts)
        self._tell()
        picked = sample(logits[: len(wanted)], [row.sampler for row in _sampled(work)], self._randomness)
        return Launched(work, logits, picked)

    def _hand_out(self, launched: Launched, picked: Collection[int | ServeError]) -> None:
        """Give each row what it gets from a step, unless it has left meanwhile."""
        work, logits = launched.work, launched.logits
        sampled = _sampled(work)
        at = len(sampled)
        for row, count in work:
            if not row.decoding:
                if row.request.sampling.prompt_logprobs:
                    output.tell_prompt_tokens(row, count, logits[at : at + count])
                    at += count
                row.num_read += count
                self._hold(row)
        for i, (row, token) in enumerate(zip(sampled, picked, strict=True)):
            if row.left:
                continue
            if isinstance(token, ServeError):
                self._fail(row.request, token)
                self._leave(row)
            else:
                self._take_token(row, token, logits, i)

    def _take_token(self, row: Sequence, token_id: int, logits: torch.Tensor, i: int) -> None:
        """Do what the next step has to know of a token, picked from row `i` of the logits."""
        sampling = row.request.sampling
        row.answer_ids.append(token_id)
        row.sampler.note(token_id)
        tokens: tuple[Token, ...] = ()
        if sampling.logprobs is not None:
            tokens = tuple(with_logprobs(logits[i : i + 1], [token_id], sampling.logprobs))
        reason = None
        if token_id in row.sampler.eos_token_ids:
            reason = FinishReason.STOP
        elif len(row.answer_ids) == sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        self._untold.append(PendingToken(row, token_id, tokens, reason))
        if reason is not None:
            self._leave(row)

    def _tell(self) -> None:
        """Send what has not been told and wake its readers, once for all of them."""
        told = []
        while self._untold:
            untold = self._untold[0]
            row, request = untold.row, untold.row.request
            told.append(request)
            try:
                output.tell(untold)
            except Exception:
                logger.exception("request %s failed in a token's text", request.request_id)
                endings.fail(request, InternalError())
            if request.channel.ended and not row.left:
                self._leave(row)
            self._untold.pop(0)
        self._wake(told)

    def _fail(self, request: Request, error: ServeError) -> None:
        endings.fail(request, error)
        self._wake([request])

    def _leave(self, row: Sequence) -> None:
        row.left = True
        self.scheduler.rows.remove(row)
        self._hold(row)
        self._kv_cache.free(row.place)
        self._rate.note()
        if not self.scheduler.rows:
            self._under_way = None  # nobody waits for it


def _is_unwanted(row: Sequence) -> bool:
    return row.request.cancelled or row.request.channel.ended


def _is_late(row: Sequence, now_s: float) -> bool:
    deadline_s, limit_s = row.request.deadline_s, row.sampler.max_time_s
    return (deadline_s is not None and now_s >= deadline_s) or (
        limit_s is not None and now_s - row.started_s >= limit_s
    )
