"""The fallback: generates the requests that cannot be batched, one after the other.

It owns its queue, the running request, the memory limit and the error handling of a call. One thread runs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from transformers import MistralForCausalLM, PreTrainedTokenizerBase

from model_server.engine.fault_isolation import OUT_OF_MEMORY
from model_server.engine.outputs.output import finish_with_error
from model_server.engine.scheduling.fair_queue import FairQueue
from model_server.engine.unbatched.generate import generate
from model_server.errors import BadRequest, InternalError, OutOfMemory, ServeError
from model_server.request import Request

logger = logging.getLogger(__name__)


class GenerateFallback:
    """Generates one request at a time with `model.generate`."""

    def __init__(self, model: MistralForCausalLM, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
        """Make a fallback; `max_tokens` limits the sequences times length of one call."""
        self.waiting = FairQueue()
        self.running: Request | None = None
        self._max_tokens = max_tokens
        self._model = model
        self._tokenizer = tokenizer

    def check_fits(self, request: Request) -> None:
        """Raise BadRequest if a request needs more than `max_tokens`."""
        sequences = max(request.sampling.generate.get("num_beams") or 1, request.sampling.num_choices)
        needed = sequences * request.max_tokens
        if needed > self._max_tokens:
            raise BadRequest(
                f"{sequences} sequences of {request.max_tokens} tokens need {needed} tokens of memory; "
                f"this server has {self._max_tokens} for one such request. Ask for fewer beams or tokens.",
                field="num_beams" if sequences > 1 else "max_new_tokens",
            )

    def generate(self, request: Request, *, wake: Callable[[], None], on_step: Callable[[], None]) -> None:
        """Generate a request and end it; if the call fails, end it with an error.

        Args:
            wake: wakes the request's reader.
            on_step: is called after every step.

        Raises:
            torch.AcceleratorError: the accelerator fails until the process restarts.
        """

        def should_stop() -> bool:
            on_step()
            return request.cancelled or request.is_late(time.monotonic())

        try:
            generate(self._model, self._tokenizer, request, wake=wake, should_stop=should_stop)
        except ServeError as error:
            finish_with_error(request, error)
        except OUT_OF_MEMORY:
            finish_with_error(request, OutOfMemory("The server ran out of memory; send the request again later."))
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("request %s failed in generate", request.request_id)
            finish_with_error(request, InternalError())
        wake()
