"""One `model.generate` call for one request: what the own lane does (beams, prompt lookup, guidance, ...).

Tokens are sent as they are made where `generate` can stream them, all at the end where it cannot. Leaves out who is
next and what becomes of a call that fails (`own_lane.py`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MistralForCausalLM, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from model_server.errors import BadRequest
from model_server.request import Finished, FinishReason, Request, TextDelta
from model_server.telemetry import request_log


class _Ending(StoppingCriteria):
    """Ends a `generate` call from outside: the client left, time is up, a stop string was met."""

    def __init__(self, request: Request, tick: Callable[[], None]) -> None:
        self.request = request
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        self.tick()
        request = self.request
        over = (
            request.cancelled
            or request.channel.ended
            or (request.deadline_s is not None and time.monotonic() >= request.deadline_s)
            or all(d.stopped for d in request.detokenizers)
        )
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)


class _Streamer(BaseStreamer):
    """Hands tokens over as `generate` makes them; the first call brings the prompt."""

    def __init__(self, answer: _Answer) -> None:
        self.answer = answer
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token_id in value.flatten().tolist():
            self.answer.add(token_id)

    def end(self) -> None:
        pass


class _Answer:
    """One answer being sent: counts its tokens and settles why it ended."""

    def __init__(self, request: Request, index: int, eos_token_ids: frozenset[int], wake: Callable[[], None]) -> None:
        self.request, self.index, self.wake = request, index, wake
        self.eos_token_ids = eos_token_ids
        self.detokenizer = request.detokenizers[index]
        self.num_tokens = 0
        self.at_eos = False

    def add(self, token_id: int) -> None:
        if self.at_eos or self.detokenizer.stopped:
            return
        self.num_tokens += 1
        request_log.token(self.request)
        self.at_eos = token_id in self.eos_token_ids
        text = self.detokenizer.push(token_id)
        if text:
            self.request.channel.send(TextDelta(text, self.index))
            self.wake()

    def end(self) -> FinishReason:
        text = self.detokenizer.flush()
        if text:
            self.request.channel.send(TextDelta(text, self.index))
        reason = FinishReason.STOP if self.at_eos or self.detokenizer.stopped else FinishReason.LENGTH
        self.request.channel.send(Finished(reason, self.request.num_prompt_tokens, self.num_tokens, self.index))
        return reason


def generate(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    *,
    wake: Callable[[], None],
    tick: Callable[[], None] = lambda: None,
) -> FinishReason | None:
    """Answer a request with one `generate` call; return why its last answer ended, None if somebody else ended it.

    `wake` is called after something was sent; `tick` at every step, for whoever watches that steps go on.

    Raises:
        BadRequest: Transformers refuses the combination of parameters.
    """
    sampling = request.sampling
    arguments = dict(sampling.generate)
    arguments.pop("num_return_sequences", None)  # said by num_answers
    negative = arguments.pop("negative_prompt_ids", None)
    if negative is not None:
        arguments["negative_prompt_ids"] = torch.tensor([negative], device=model.device)
    prompt = torch.tensor([request.prompt_ids], device=model.device)
    beams = (arguments.get("num_beams") or 1) > 1
    if beams and sampling.stop:
        # Beams end at a stop string only if `generate` knows it; elsewhere our text does that, and exactly.
        arguments |= {"stop_strings": list(sampling.stop), "tokenizer": tokenizer}
    if sampling.seed is not None:
        # The global generator is this lane's alone: the shared lane draws from generators of its own.
        torch.manual_seed(sampling.seed)
    try:
        if arguments.pop("token_healing", False):
            prompt = model.heal_tokens(prompt, _with_padding(tokenizer))
        config, _ = model._prepare_generation_config(None, **sampling.generate)
        eos = config.eos_token_id
        eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
        answers = [_Answer(request, i, eos_token_ids, wake) for i in range(sampling.num_choices)]
        streamer = _Streamer(answers[0]) if not beams and len(answers) == 1 else None
        with torch.inference_mode():
            sequences = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=sampling.max_new_tokens,
                num_return_sequences=len(answers),
                stopping_criteria=StoppingCriteriaList([_Ending(request, tick)]),
                streamer=streamer,
                **arguments,
            )
    except (ValueError, TypeError, LookupError) as error:
        # LookupError: healing a prompt that ends in no token's beginning; a self-hashing watermark without greens.
        reason = f"no entry for {error}" if isinstance(error, LookupError) else str(error)
        raise BadRequest(f"The parameters cannot be used together: {reason}") from error
    ended_elsewhere = request.channel.ended
    for answer, sequence in zip(answers, sequences, strict=True):
        if streamer is None:
            for token_id in sequence[prompt.shape[1] :].tolist():
                answer.add(token_id)
        ending = answer.end()
    wake()
    return None if ended_elsewhere else ending


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can pad, which healing asks for though it never pads a single prompt."""
    if tokenizer.pad_token is not None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
