"""The sampler of one sequence: Transformers' logits processors, a random generator and the tokens so far.

A sampler is built on the CPU from the configuration that `generate` would use, without waiting for the device. Only the
tensors that its processors read at every step (token ids, tables) are copied to the model's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MistralForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model_server.compute.gpu.host_device import to_device
from model_server.errors import BadRequest
from model_server.request import SamplingParams

CPU = torch.device("cpu")


class CountPenalty(LogitsProcessor):
    """OpenAI's frequency and presence penalties: lower the logits of tokens that the output already contains.

    https://platform.openai.com/docs/api-reference/completions/create
    """

    def __init__(self, num_prompt_tokens: int, frequency: float, presence: float) -> None:
        self.num_prompt_tokens, self.frequency, self.presence = num_prompt_tokens, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self.num_prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


PENALTIES = (CountPenalty, RepetitionPenaltyLogitsProcessor)
"""Batchable processors that read the tokens so far."""
TRUNCATIONS = (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Batchable processors that exclude tokens."""
BATCHABLE = (*PENALTIES, TemperatureLogitsWarper, *TRUNCATIONS)
"""Processors that `sampling` applies to many sequences together, in this order."""


@dataclass(slots=True)
class SequenceSampler:
    """The sampler of one sequence."""

    processors: LogitsProcessorList
    do_sample: bool
    eos_token_ids: frozenset[int]
    max_time_s: float | None
    generator: torch.Generator | None
    """The random generator of a sequence with a seed; None uses the batch's generator."""
    history: Tensor | None
    """(1, prompt + max_new_tokens) token ids, filled up to `length`; None if no processor reads them."""
    length: int
    num_logprobs: int | None = None
    """The number of likeliest alternatives to report with each token's log-probability; None reports neither."""
    by_type: dict[type, LogitsProcessor] = field(init=False)
    """The processors by type."""
    batchable: bool = field(init=False)
    """Whether all processors have `BATCHABLE` types, in the same order."""
    truncates: bool = field(init=False)
    """Whether a processor excludes tokens."""

    def __post_init__(self) -> None:
        types = [type(p) for p in self.processors]
        self.by_type = dict(zip(types, self.processors, strict=True))
        self.batchable = types == [type_ for type_ in BATCHABLE if type_ in types]
        self.truncates = any(type_ in TRUNCATIONS for type_ in types)

    def append(self, token: Tensor | int) -> None:
        """Append a sampled token, which may be on the device, to the history."""
        if self.history is not None:
            # To assign an int to an element of a CUDA tensor, PyTorch copies it from the host and waits.
            self.history[0, self.length].fill_(token)
            self.length += 1

    @property
    def tokens(self) -> Tensor:
        """The tokens of prompt and output so far, (1, length); empty if no processor reads them."""
        if self.history is None:
            return torch.empty((1, 0), dtype=torch.long)
        return self.history[:, : self.length]


def sequence_sampler(model: MistralForCausalLM, prompt_ids: Sequence[int], sampling: SamplingParams) -> SequenceSampler:
    """Build a sequence's sampler from the configuration that `generate` would use.

    Raises:
        BadRequest: Transformers refuses the combination of parameters.
    """
    try:
        config = generation_config(model, len(prompt_ids), sampling)
        # A watermark draws its table with a generator of the device, so it is built there and waits for the device.
        build_on = CPU if config.watermarking_config is None else model.device
        processors = model._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=torch.tensor([list(prompt_ids)], device=build_on),
            device=build_on,
        )
    except (ValueError, TypeError) as error:
        raise BadRequest(f"The parameters cannot be used together: {error}") from error
    if sampling.frequency_penalty or sampling.presence_penalty:
        penalty = CountPenalty(len(prompt_ids), sampling.frequency_penalty, sampling.presence_penalty)
        processors = LogitsProcessorList([penalty, *processors])
    for processor in processors:
        _move_tensors(processor, model.device)
    generator = None
    if sampling.seed is not None and config.do_sample:
        generator = torch.Generator(model.device).manual_seed(sampling.seed)
    history = None
    if any(type(p) not in BATCHABLE or type(p) in PENALTIES for p in processors):
        history = torch.empty((1, len(prompt_ids) + sampling.max_new_tokens), dtype=torch.long, device=model.device)
        history[0, : len(prompt_ids)] = to_device(prompt_ids, model.device, torch.long)
    eos = config.eos_token_id
    return SequenceSampler(
        processors=processors,
        do_sample=bool(config.do_sample),
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
        max_time_s=config.max_time,
        generator=generator,
        history=history,
        length=len(prompt_ids),
        num_logprobs=sampling.logprobs,
    )


def generation_config(model: MistralForCausalLM, num_prompt_tokens: int, sampling: SamplingParams) -> GenerationConfig:
    """Return the configuration that `generate` would use: the model's fields, overridden by the request's.

    Raises:
        ValueError: Transformers refuses the configuration.
    """
    config, _ = model._prepare_generation_config(None, **sampling.generate)
    config.max_new_tokens = sampling.max_new_tokens
    config.max_length = num_prompt_tokens + sampling.max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = num_prompt_tokens + config.min_new_tokens
    config.validate()
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=CPU, batch_size=1)
    return config


def _move_tensors(processor: LogitsProcessor, device: torch.device) -> None:
    """Copy the tensors of a processor that was built on the CPU to a device, without waiting for the device."""
    if device.type == "cpu":
        return
    for name, value in vars(processor).items():
        if isinstance(value, Tensor) and value.device != device:
            pinned = value.pin_memory() if device.type == "cuda" else value
            setattr(processor, name, pinned.to(device, non_blocking=True))
