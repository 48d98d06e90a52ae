"""The step loop for accelerators: the host processes one step while the device computes the next."""

from __future__ import annotations

import logging

import torch

from model_server.compute.gpu.host_device import to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.engine.batch import BatchLoop
from model_server.engine.fault_isolation import OUT_OF_MEMORY, isolate_faults
from model_server.engine.sequence import Sequence
from model_server.engine.step import Batch, InFlightStep
from model_server.errors import ServeError

logger = logging.getLogger(__name__)


class OverlappedBatchLoop(BatchLoop):
    """A step loop for a device that computes asynchronously.

    The loop launches step N+1 before it copies the tokens of step N to the host. Decoding sequences take those tokens
    on the device; prompt chunks need none. At most one launched step is unread. A sequence that stops in step N is
    still part of step N+1, and the loop discards its token there. If step N+1 needs the tokens of step N on the host,
    only detokenization overlaps it.
    """

    in_flight: InFlightStep | None = None
    """The step whose tokens the next call of `step` reads."""

    def step(self) -> None:
        """Launch the next step and finish the step in flight; if no step is in flight, run a step."""
        if self.in_flight is not None:
            self._step_ahead(self.in_flight)
        else:
            self._step_synchronously()
        if self.in_flight is not None or not self.scheduler.sequences:
            self.flush_output()  # otherwise the next launch flushes it

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        if not self.scheduler.sequences:
            self.in_flight = None  # its tokens would all be discarded

    def _step_ahead(self, previous: InFlightStep) -> None:
        """Launch the next step if it can take its tokens on the device; then read the tokens of the step in flight.

        If the launch fails, the next call runs that step with its tokens on the host and isolates the fault.
        """
        self.in_flight, following = None, None
        try:
            following = self._launch_ahead(previous)
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.debug("a step could not be launched ahead", exc_info=True)
        tokens = previous.sampled.read()
        self.in_flight = following
        self.process_outputs(previous, tokens)

    def _step_synchronously(self) -> None:
        whole = self.plan()
        if not whole:
            return

        def compute(batch: Batch) -> tuple[InFlightStep, list[int | ServeError]] | None:
            """Return a step and its tokens, or None if the step stays in flight."""
            step = self.launch(batch)
            if batch is whole and _can_stay_in_flight(batch):
                self.in_flight = step
                return None
            return step, step.sampled.read()

        try:
            for batch, result in isolate_faults(whole, compute, self._fail_in_step):
                self.advance_prefill(batch)
                if result is not None:
                    self.process_outputs(*result)
        except OUT_OF_MEMORY:
            self._fail_newest()

    def _launch_ahead(self, previous: InFlightStep) -> InFlightStep | None:
        """Launch a step for the sequences with tokens left to generate; return None if it cannot stay in flight."""
        tokens = previous.sampled.on_device
        assert tokens is not None, "a step without tokens on the device is not left in flight"
        indices = {sequence: i for i, sequence in enumerate(previous.batch.sampled)}
        decode = [s for s in self.scheduler.sequences if s.decoding and s.remaining_tokens > 1]
        batch = Batch(decode, self._prefill.plan())
        if not batch or not _can_stay_in_flight(batch):
            return None
        which = [indices[s] for s in decode]
        if which != list(range(len(tokens))):
            tokens = tokens[to_device(which, tokens.device, torch.long)]
        ranges = [TokenRange(s.kv_offset, s.kv_len + 1, [0]) for s in decode]
        logits = self.runner.forward(ranges, batch.ranges, batch.logit_indices, tokens)
        step = self.sample(batch, logits)
        self.advance_prefill(batch)
        return step


def _can_stay_in_flight(batch: Batch) -> bool:
    """Return whether the host can sample a step and launch the next one before it reads the step's tokens.

    Drafts, grammars and logits processors that run for a single sequence need the last token on the host.
    """
    return all(s.sampler.batchable and not s.needs_last_token for s in batch.sampled)
