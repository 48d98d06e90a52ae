"""Generates one request that cannot be batched, such as beam search or guidance, with one `model.generate` call.

Tokens are sent one by one if `generate` can stream them, otherwise all at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import MistralForCausalLM, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from model_server.engine.outputs.output import OutputWriter, finish_reason
from model_server.errors import BadRequest
from model_server.request import FinishReason, Request


class _Stop(StoppingCriteria):
    """Stops `generate` after a step for which `should_stop` returns true."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self._should_stop(), dtype=torch.bool, device=input_ids.device)


class _Streamer(BaseStreamer):
    """Passes on the tokens of each step. The first `put` has the prompt, which it drops."""

    def __init__(self, write: Callable[[Sequence[int]], None]) -> None:
        self._write = write
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self._write(value.flatten().tolist())
        self._has_prompt = True

    def end(self) -> None:
        pass


def generate(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    *,
    wake: Callable[[], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Generate a request with one `model.generate` call and send its output.

    Args:
        wake: is called after events were sent.
        should_stop: is called after every step; if it returns true, generation ends with the tokens so far.

    Raises:
        BadRequest: Transformers refuses the combination of parameters.
    """
    sampling = request.sampling
    arguments = dict(sampling.generate)
    arguments.pop("num_return_sequences", None)  # `num_choices` has it
    negative = arguments.pop("negative_prompt_ids", None)
    if negative is not None:
        arguments["negative_prompt_ids"] = torch.tensor([negative], device=model.device)
    prompt = torch.tensor([request.prompt_ids], device=model.device)
    beams = (arguments.get("num_beams") or 1) > 1
    if beams and sampling.stop:
        # Beams are not streamed, so `generate` has to find the stop strings itself.
        arguments |= {"stop_strings": list(sampling.stop), "tokenizer": tokenizer}
    if sampling.seed is not None:
        # Only the fallback uses the global generator: the batch has its own generators.
        torch.manual_seed(sampling.seed)
    writers = [OutputWriter(request, index) for index in range(sampling.num_choices)]
    try:
        if arguments.pop("token_healing", False):
            prompt = model.heal_tokens(prompt, _with_padding(tokenizer))
        config, _ = model._prepare_generation_config(None, **sampling.generate)
        eos = config.eos_token_id
        eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos or ())

        def write(writer: OutputWriter, token_ids: Sequence[int]) -> None:
            for token_id in token_ids:
                num_tokens = writer.num_tokens + 1
                writer.write(token_id, finish_reason(token_id, num_tokens, eos_token_ids, sampling.max_new_tokens))
            wake()

        streamer = None if beams or len(writers) > 1 else _Streamer(lambda token_ids: write(writers[0], token_ids))
        with torch.inference_mode():
            sequences = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=sampling.max_new_tokens,
                num_return_sequences=len(writers),
                stopping_criteria=StoppingCriteriaList(
                    [_Stop(lambda: should_stop() or all(w.finished for w in writers))]
                ),
                streamer=streamer,
                **arguments,
            )
    except (ValueError, TypeError, LookupError) as error:
        # LookupError: token healing finds no token that starts with the prompt's last, or a watermark favours none.
        reason = f"no entry for {error}" if isinstance(error, LookupError) else str(error)
        raise BadRequest(f"The parameters cannot be used together: {reason}") from error
    for writer, sequence in zip(writers, sequences, strict=True):
        if streamer is None:
            write(writer, sequence[prompt.shape[1] :].tolist())
        writer.finish(FinishReason.LENGTH)
    wake()


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a padding token: token healing requires it, but never pads a single prompt."""
    if tokenizer.pad_token is not None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer
