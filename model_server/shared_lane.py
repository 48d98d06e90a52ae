"""The shared lane: the rows that decode together, one step of theirs after the other.

Owns who has a place, what a step computes and what becomes of its tokens, and whom a fault of a step ends. Used by one
thread alone; what it shares with others (the line) is locked by the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from . import endings, journal
from .errors import InternalError, OutOfMemory, ServeError
from .memory import Segment
from .prefixes import MIN_TOKENS, Prefixes, num_common
from .request import Chunk, Final, FinishReason, PromptTokens, Request, Token
from .runner import Runner
from .sampling import row_sampler, sample, with_logprobs
from .scheduler import Row, Scheduler, newest_first

logger = logging.getLogger(__name__)

Work = list[tuple[Row, int]]
"""A step: rows with the number of their tokens it computes. Decoding rows come first, with one token each."""


def _sampled(work: Work) -> list[Row]:
    """Return the rows that get a token from a step: those that decode, and those whose prompt it completes."""
    return [row for row, count in work if row.decoding or count == row.num_unread]


class SharedLane:
    """Rows over one runner; its methods return the requests that have news for their readers."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_size: int,
        prefill_tokens: int,
        whole_prompt_tokens: int,
        prefix_caching: bool,
        rate: endings.EndingRate,
    ) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            max_batch_size=max_batch_size, prefill_tokens=prefill_tokens, whole_prompt_tokens=whole_prompt_tokens
        )
        self._memory = runner.memory
        self._prefixes = Prefixes()
        self._prefix_caching = prefix_caching
        self._rate = rate
        self._randomness = torch.Generator(runner.model.device)
        self._randomness.seed()

    def drop_the_gone(self) -> list[Request]:
        """End rows whose client left, whose time is up, or that another thread has ended."""
        now_s = time.monotonic()
        dropped = []
        for row in list(self.scheduler.rows):
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

    def admit(self, lock: AbstractContextManager[object]) -> list[Request]:
        """Give free places to waiting requests; return those that could not start after all."""
        failed = []
        while self.scheduler.num_free:
            # Under the lock from the line to the place: a drain that looked in between would find nobody here.
            with lock:
                request = self.scheduler.next_request(self._fits)
                if request is None:
                    break
                try:
                    sampler = row_sampler(self.runner.model, request.prompt_ids, request.sampling)
                except ServeError as error:
                    endings.fail(request, error)
                    failed.append(request)
                    continue
                place = self._memory.take(request.max_tokens)
                assert place is not None, "it fitted a moment ago, and only this thread takes"
                self.scheduler.rows.append(Row(request, place, sampler, started_s=time.monotonic()))
        return failed

    def _fits(self, request: Request) -> bool:
        return self._memory.num_fitting([request.max_tokens]) == 1

    def step(self) -> list[Request]:
        """Run one step and hand out its tokens; return the requests that have news."""
        work: Work = [(row, 1) for row in self.scheduler.rows if row.decoding]
        work += self._plan_prefill()
        news = [row.request for row, _ in work]
        try:
            self._compute(work)
        except (torch.OutOfMemoryError, MemoryError):
            news.append(self._shed())
        return news

    def rest(self) -> None:
        """Hand back memory that nothing runs in, and with it what was kept there; call when there are no rows."""
        if self._memory.trim():
            self._prefixes.clear()

    def _plan_prefill(self) -> Work:
        """Return what the step reads of which prompts; a row that comes to be read is looked up first."""
        waiting: set[Row] = set()
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

    def _cached(self, row: Row) -> tuple[int, int]:
        """Return where other rows have left the beginning of this row's prompt, and how many tokens of it."""
        if self._may_share(row):
            # The last token is always read, for its logits.
            source, count = self._prefixes.longest(row.request.prompt_ids[:-1], row.place)
            if count >= MIN_TOKENS:
                return source, count
        return row.place, 0

    def _may_share(self, row: Row) -> bool:
        # Read in other pieces, a prompt is rounded otherwise in 16 bits: one with a seed asks for the same text again.
        sampling = row.request.sampling
        return self._prefix_caching and sampling.seed is None and not sampling.prompt_logprobs

    def _is_being_read(self, row: Row, num_cached: int, reading: Sequence[Row]) -> bool:
        """Say whether waiting for another row, which is reading the same, saves half a step's reading or more."""
        enough = num_cached + self.scheduler.prefill_tokens // 2
        prompt_ids = row.request.prompt_ids[:-1]
        return self._may_share(row) and any(
            num_common(other.request.prompt_ids, prompt_ids) >= enough for other in reading
        )

    def _begin(self, row: Row, source: int, num_cached: int) -> None:
        """Have a row's prompt read, after what others have read of it."""
        row.begun = True
        row.num_read = row.request.num_cached = num_cached
        if source != row.place:
            self._memory.copy(source, row.place, num_cached)
        self._prefixes.forget(row.place, row.request.max_tokens)
        self._hold(row)

    def _hold(self, row: Row) -> None:
        """Note whose keys and values a row has written: all but those of its last token."""
        if self._prefix_caching:
            self._prefixes.hold(row.place, [*row.request.prompt_ids[: row.num_read], *row.answer_ids[:-1]])

    def _shed(self) -> Request:
        """Out of memory: the newest row goes, the others try again without it."""
        row = newest_first(self.scheduler.rows)[0]
        logger.warning("out of memory in a step of %d rows: shed the newest", len(self.scheduler.rows))
        endings.fail(row.request, OutOfMemory("The server ran out of memory; send the request again later."))
        self._leave(row)
        if self.runner.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return row.request

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
            endings.fail(row.request, InternalError())
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
        logits = self.runner.forward(decode, prefill, wanted + of_prompts)
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
                self._hold(row)
        for i, (row, token) in enumerate(zip(sampled, picked, strict=True)):
            if isinstance(token, ServeError):
                endings.fail(row.request, token)
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
        self.scheduler.rows.remove(row)
        self._hold(row)
        self._memory.give_back(row.place)
        self._rate.note()
