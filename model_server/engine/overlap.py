"""The step loop for accelerators: overlap scheduling, host work on one step while the device computes the next."""

from __future__ import annotations

import logging

import torch

from model_server.compute.gpu.host_device import AsyncHostCopy, to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.engine.batch import BatchLoop
from model_server.engine.fault_isolation import OUT_OF_MEMORY, isolate_faults
from model_server.engine.sequence import Sequence
from model_server.engine.step import Batch, InFlightStep
from model_server.errors import ServeError

logger = logging.getLogger(__name__)


class OverlappedBatchLoop(BatchLoop):
    """A step loop whose forward returns before it is computed.

    While all sequences decode, step N+1 is launched before the tokens of step N are copied to the host: it takes them
    from the device. A sequence that stops in step N is part of step N+1, and its token there is discarded. Where step
    N+1 needs step N's tokens on the host, only detokenization overlaps it.
    """

    in_flight: InFlightStep | None = None
    """The step whose tokens the next call of `step` reads."""
    _unsampled: AsyncHostCopy | None = None
    """Marks the end of the latest step without tokens."""

    def step(self) -> None:
        """Finish the step in flight and launch the next one; without one in flight, run a step."""
        if self.in_flight is not None:
            self._step_ahead(self.in_flight)
        else:
            self._step_synchronously()
        if self.in_flight is not None or not self.scheduler.sequences:
            self.flush_output()  # else the next launch does

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        if not self.scheduler.sequences:
            self.in_flight = None  # its tokens would all be discarded

    def _step_ahead(self, previous: InFlightStep) -> None:
        """Launch the step after one in flight, if it can take its tokens from the device; then read those.

        If the launch fails, the next call runs the step with the tokens on the host, and a fault is handled there.
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
        batch = self.plan()
        try:
            for _, result in isolate_faults(batch, self._compute_or_leave_in_flight, self._fail_in_step):
                if result is not None:
                    self.process_outputs(*result)
        except OUT_OF_MEMORY:
            self._fail_newest()

    def _compute_or_leave_in_flight(self, batch: Batch) -> tuple[InFlightStep, list[int | ServeError]] | None:
        """Return a step and its tokens, or None if it can be left in flight."""
        step = self.launch(batch)
        if self._can_overlap(step):
            self.in_flight = step
            return None
        if not batch.sampled:
            self._wait_for_previous_unsampled()
        return step, step.sampled.read()

    def _can_overlap(self, step: InFlightStep) -> bool:
        """Return whether the next step can be launched before the host has this one's tokens."""
        batch = step.batch
        return (
            step.sampled.on_device is not None
            and len(batch.decode) == len(self.scheduler.sequences)  # no prefill, and no half of a step that failed
            and not any(s.needs_last_token for s in batch.decode)
        )

    def _launch_ahead(self, previous: InFlightStep) -> InFlightStep | None:
        """Launch a step for the sequences that surely go on; None if there are none, or if others must prefill."""
        tokens = previous.sampled.on_device
        going = [i for i, s in enumerate(previous.batch.decode) if not s.finished and s.remaining_tokens > 1]
        if tokens is None or not going or not all(s.decoding for s in self.scheduler.sequences):
            return None
        if any(s.needs_last_token for s in previous.batch.decode):  # since its tokens were read, a guess was right
            return None
        if len(going) < len(previous.batch.decode):
            tokens = tokens[to_device(going, tokens.device)]
        batch = Batch([previous.batch.decode[i] for i in going])
        decode = [TokenRange(s.kv_offset, s.kv_len + 1, [0]) for s in batch.decode]
        logits = self.runner.forward(decode, [], range(len(decode)), tokens)
        return self.sample(batch, logits)

    def _wait_for_previous_unsampled(self) -> None:
        """Bound the launches: of steps that only prefill, and so have no token to wait for, one is in flight."""
        marker = torch.zeros(1, device=self.runner.model.device)
        previous, self._unsampled = self._unsampled, AsyncHostCopy(marker)
        if previous is not None:
            previous.read()
