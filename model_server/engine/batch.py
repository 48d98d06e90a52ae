"""The step loop of continuous batching: plan, forward, sample, process the outputs.

One thread runs the loop. Admission, prefill planning, fault isolation and output are in their own modules.
`overlap.py` has the loop for accelerators.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sized
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner
from model_server.compute.sampling import sample
from model_server.compute.sequence_sampler import sequence_sampler
from model_server.compute.token_mask import TokenMaskFiller
from model_server.engine.config import EngineConfig
from model_server.engine.fault_isolation import OUT_OF_MEMORY, isolate_faults
from model_server.engine.grammar_masks import GrammarMasks
from model_server.engine.outputs.output import finish_reason, finish_with_error
from model_server.engine.outputs.output_queue import OutputQueue, PendingToken
from model_server.engine.outputs.prompt_logprobs import launch_prompt_logprobs, read_prompt_logprobs
from model_server.engine.prompt_lookup import prompt_lookup
from model_server.engine.scheduling.admission import admit_next
from model_server.engine.scheduling.drafts import plan_drafts
from model_server.engine.scheduling.prefill import PrefillPlanner
from model_server.engine.scheduling.scheduler import Scheduler
from model_server.engine.sequence import Sequence, SequenceStatus
from model_server.engine.step import Batch, InFlightStep
from model_server.engine.verification import verify_drafts
from model_server.errors import InternalError, OutOfMemory, ServeError
from model_server.request import FinishReason, Request, Token

logger = logging.getLogger(__name__)


class BatchLoop:
    """Generates tokens for all sequences of the batch, one step at a time."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        wake: Callable[[Iterable[Request]], None],
        on_release: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a loop with an empty batch.

        Args:
            wake: wakes the readers of requests.
            on_release: is called after a sequence has left the batch.
        """
        self.runner = runner
        self.scheduler = Scheduler(
            max_batch_size=config.max_batch_size,
            max_prefill_tokens_per_step=config.max_prefill_tokens_per_step,
            max_prefill_tokens_when_idle=config.max_prefill_tokens_when_idle,
        )
        self.output = OutputQueue(wake)
        self._prefill = PrefillPlanner(self.scheduler, runner.kv_cache, prefix_caching=config.prefix_caching)
        self._wake = wake
        self._on_release = on_release
        self._clock = clock
        self._masks = GrammarMasks(TokenMaskFiller(runner.model.config.vocab_size, runner.model.device))
        self._generator = torch.Generator(runner.model.device)
        self._generator.seed()

    @property
    def requests(self) -> list[Request]:
        """The admitted requests whose last event is not yet sent; callable from any thread."""
        return list(dict.fromkeys([*(s.request for s in [*self.scheduler.sequences]), *self.output.requests]))

    @property
    def kv_usage(self) -> float:
        """The share of the KV cache that the batch has allocated, 0 to 1; callable from any thread."""
        sequences = [*self.scheduler.sequences]
        return sum(s.request.max_tokens for s in sequences) / self.runner.kv_cache.num_tokens

    def step(self) -> None:
        """Run one step for all sequences."""
        batch = self.plan()
        if not batch:
            return
        try:
            for _, (step, tokens) in isolate_faults(batch, self._compute, self._fail_in_step):
                self.advance_prefill(step.batch)
                self.process_outputs(step, tokens)
        except OUT_OF_MEMORY:
            self._fail_newest()
        self.flush_output()

    def plan(self) -> Batch:
        """Plan a step: sequences with a computed prompt decode, and the scheduler chooses the prompt tokens to prefill.

        The plan is empty if every sequence of the batch waits for its grammar mask.
        """
        decoding = [s for s in self.scheduler.sequences if s.decoding and not s.sits_out]
        prefill = self._prefill.plan()
        drafts = plan_drafts(
            decoding,
            device_type=self.runner.model.device.type,
            max_tokens=self.scheduler.max_prefill_tokens_per_step - sum(chunk.num_tokens for chunk in prefill),
        )
        drafting = {draft.sequence for draft in drafts}
        batch = Batch([s for s in decoding if s not in drafting], prefill, drafts)
        if not batch:
            self.flush_output()
            self._masks.wait(self.scheduler.sequences)
        return batch

    def launch(self, batch: Batch) -> InFlightStep:
        """Launch a step whose tokens are all known on the host."""
        self._masks.start(batch.sampled)
        decode = [TokenRange(s.kv_offset, s.kv_len, s.output_ids[-1:]) for s in batch.decode]
        logits = self.runner.forward(decode, batch.ranges, batch.logit_indices)
        self.flush_output()  # on an accelerator, while the forward runs
        return self.sample(batch, logits)

    def sample(self, batch: Batch, logits: Tensor) -> InFlightStep:
        """Sample a token for each of `batch.sampled` from a forward's logits, except where a grammar mask is late."""
        late = self._masks.late(batch)
        prompt_logprobs = launch_prompt_logprobs(batch, logits)
        if late:  # copies no logits of prompts: they take as much memory as the rest of the step
            batch, logits = batch.without(late, logits)
        samplers = [sequence.sampler for sequence in batch.sampled]
        # Sampling comes last: it appends to histories, so a step can be run again only if it failed before sampling.
        sampled = sample(logits[: len(samplers)], samplers, self._generator, self._masks.of(batch.sampled))
        # Even an empty view would keep all logits on the device while the next step runs.
        drafted = logits[-batch.num_drafted :] if batch.num_drafted else logits.new_empty((0, logits.shape[-1]))
        return InFlightStep(batch, sampled, prompt_logprobs, drafted)

    def advance_prefill(self, batch: Batch) -> None:
        """Record that a step's prompt chunks are computed, or will be before any step launched later."""
        for chunk in batch.prefill:
            chunk.sequence.advance_prefill(chunk.num_tokens)
            self._prefill.record(chunk.sequence)

    def process_outputs(self, step: InFlightStep, tokens: Sized[int | ServeError]) -> None:
        """Append to each sequence the token that a step computed for it; discard the tokens of finished sequences."""
        batch, logprobs = step.batch, step.sampled.read_logprobs()
        for chunk, prompt_logprobs in step.prompt_logprobs.items():
            if not chunk.sequence.finished:
                chunk.sequence.request.channel.send(read_prompt_logprobs(chunk, prompt_logprobs))
        for i, (sequence, token) in enumerate(zip(batch.sampled, tokens, strict=True)):
            if sequence.finished:
                continue
            if isinstance(token, ServeError):
                self.fail(sequence, token)
                continue
            try:
                self._append_token(sequence, token, logprobs.get(i))
            except ServeError as error:
                self.fail(sequence, error)
        if batch.drafts:
            verify_drafts(step, self._sample_and_read, self.process_outputs)
        self._masks.start(batch.sampled)

    def flush_output(self) -> None:
        """Write the output of the pending tokens and release the sequences that have ended."""
        for sequence in self.output.flush():
            self.release(sequence)

    def admit(self, lock: AbstractContextManager[object]) -> None:
        """Move waiting requests into the batch while it has room; the lock guards the queue."""
        while (sequence := admit_next(self.scheduler, self.runner, lock, self._clock())) is not None:
            try:
                prompt_ids, sampling = sequence.request.prompt_ids, sequence.request.sampling
                sequence.sampler = sequence_sampler(self.runner.model, prompt_ids, sampling)
                # In 16 bits, drafted tokens change the rounding of a step, but the same seed must give the same text.
                if sequence.sampler.generator is None or self.runner.model.dtype == torch.float32:
                    sequence.lookup = prompt_lookup(prompt_ids, sampling, sequence.sampler.eos_token_ids)
            except ServeError as error:
                self.fail(sequence, error)

    def reap(self) -> None:
        """Finish sequences that were cancelled, ended by another thread, or have passed their deadline."""
        now_s = self._clock()
        ended = [s for s in self.scheduler.sequences if s.is_unwanted or s.is_late(now_s)]
        if not ended:
            return
        self.flush_output()
        for sequence in ended:
            sequence.writer.finish(FinishReason.LENGTH)
            self._wake([sequence.request])
            self.release(sequence)

    def fail(self, sequence: Sequence, error: ServeError) -> None:
        """End a sequence with an error."""
        finish_with_error(sequence.request, error)
        self._wake([sequence.request])
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Remove a sequence from the batch and free its KV cache; do nothing if it has finished."""
        if sequence.finished:
            return
        self._prefill.record(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.scheduler.sequences.remove(sequence)
        self.runner.kv_cache.free(sequence.kv_offset)
        self._on_release()

    def release_memory(self) -> None:
        """Return unused memory, including the prefix cache, to the system; call it only while the batch is empty."""
        if self.runner.kv_cache.release_unused():
            self._prefill.clear()

    def _sample_and_read(self, batch: Batch, logits: Tensor) -> tuple[InFlightStep, list[int | ServeError]]:
        self._masks.start(batch.sampled)
        step = self.sample(batch, logits)
        return step, step.sampled.read()

    def _compute(self, batch: Batch) -> tuple[InFlightStep, list[int | ServeError]]:
        step = self.launch(batch)
        return step, step.sampled.read()

    def _append_token(self, sequence: Sequence, token_id: int, logprob: Token | None) -> None:
        sequence.append(token_id)
        reason = finish_reason(
            token_id,
            len(sequence.output_ids),
            sequence.sampler.eos_token_ids,
            sequence.request.sampling.max_new_tokens,
        )
        self.output.append(PendingToken(sequence, token_id, reason, () if logprob is None else (logprob,)))
        if reason is not None:
            self.release(sequence)

    def _fail_in_step(self, sequence: Sequence) -> None:
        self.flush_output()
        if not sequence.finished:
            self.fail(sequence, InternalError())

    def _fail_newest(self) -> None:
        """Fail the newest sequence after a step ran out of memory: it loses the least work."""
        self.flush_output()
        logger.warning(
            "out of memory in a step of %d sequences: the newest one is ended", len(self.scheduler.sequences)
        )
        if self.scheduler.sequences:
            newest = max(self.scheduler.sequences, key=lambda s: s.request.number)
            self.fail(newest, OutOfMemory("The server ran out of memory; send the request again later."))
        if self.runner.model.device.type == "cuda":
            torch.cuda.empty_cache()
