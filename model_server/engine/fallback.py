"""The own lane: requests that cannot share a step, one `generate` call after the other.

Owns who waits for it and who has it, what fits into its memory, and what becomes of a call that fails. Used by one
thread; what it shares with others (the line, who runs) is locked by the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers import MistralForCausalLM, PreTrainedTokenizerBase

from model_server.engine import endings
from model_server.engine.generate import generate
from model_server.engine.scheduler import FairQueue
from model_server.errors import BadRequest, InternalError, OutOfMemory, ServeError
from model_server.request import Request
from model_server.telemetry import request_log

logger = logging.getLogger(__name__)


class GenerateFallback:
    """One model and the line for it."""

    def __init__(self, model: MistralForCausalLM, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int) -> None:
        """`num_tokens`: sequences times length that one call may have."""
        self.waiting = FairQueue()
        self.running: Request | None = None
        self.num_tokens = num_tokens
        self._model = model
        self._tokenizer = tokenizer

    def check_fits(self, request: Request) -> None:
        """Raise BadRequest if there can never be memory for a request."""
        sequences = max(request.sampling.generate.get("num_beams") or 1, request.sampling.num_choices)
        needed = sequences * request.max_tokens
        if needed > self.num_tokens:
            raise BadRequest(
                f"{sequences} sequences of {request.max_tokens} tokens need {needed} tokens of memory; "
                f"this server has {self.num_tokens} for one such request. Ask for fewer beams or tokens.",
                field="num_beams" if sequences > 1 else "max_new_tokens",
            )

    def answer(self, request: Request, *, wake: Callable[[], None], tick: Callable[[], None]) -> None:
        """Answer a request to its end, whatever that is; `wake` and `tick` as `generate` has them.

        Raises:
            torch.AcceleratorError: the accelerator is broken, and stays so.
        """
        try:
            reason = generate(self._model, self._tokenizer, request, wake=wake, tick=tick)
        except ServeError as error:
            endings.fail(request, error)
        except (torch.OutOfMemoryError, MemoryError):
            endings.fail(request, OutOfMemory("The server ran out of memory; send the request again later."))
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("request %s failed in generate", request.request_id)
            endings.fail(request, InternalError())
        else:
            if reason is not None:
                request_log.ended(request, "cancelled" if request.cancelled else reason.value)
        wake()
