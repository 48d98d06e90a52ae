"""Logits to token ids, each row by its own parameters.

What a row's parameters do to its logits is decided by Transformers: a row carries the `LogitsProcessorList` that
`generate` would use. Rows whose list holds only the usual processors are sampled together in tensors; the others run
their list one by one. Drawing follows `torch.multinomial` exactly, so a seeded row picks the tokens that
`torch.manual_seed(seed)` and `generate` pick, whatever else is in the batch.
"""

from __future__ import annotations

import logging
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

from model_server.compute.host_device import AsyncHostCopy, to_device
from model_server.errors import BadRequest, InternalError, ServeError
from model_server.request import SamplingParams, Token

logger = logging.getLogger(__name__)

CANDIDATES = 256
"""Rows with a smaller top_k are sampled among this many tokens instead of the whole vocabulary."""
TIES = 32
"""Candidates beyond top_k, since Transformers keeps every token that ties with the last one."""


class CountPenalty(LogitsProcessor):
    """OpenAI's frequency and presence penalties: subtract from the logits of tokens the answer already holds.

    https://platform.openai.com/docs/api-reference/completions/create
    """

    def __init__(self, num_prompt_tokens: int, frequency: float, presence: float) -> None:
        self.num_prompt_tokens, self.frequency, self.presence = num_prompt_tokens, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self.num_prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


@dataclass(slots=True)
class SequenceSampler:
    """How one row picks its tokens."""

    processors: LogitsProcessorList
    do_sample: bool
    eos_token_ids: frozenset[int]
    max_time_s: float | None
    generator: torch.Generator | None
    """The row's own randomness when it has a seed; None draws from the batch's."""
    history: Tensor | None
    """(1, prompt + max_new_tokens) token ids, filled up to `length`; None when no processor looks at it."""
    length: int
    usual: dict[type, LogitsProcessor] = field(init=False)
    """The row's processors by type."""
    is_usual: bool = field(init=False)
    """All of them are of the usual kinds, in the usual order."""

    def __post_init__(self) -> None:
        kinds = [type(p) for p in self.processors]
        in_order = [kind for kind in _USUAL if kind in kinds]
        self.usual = dict(zip(kinds, self.processors, strict=True))
        self.is_usual = kinds == in_order

    @property
    def greedy(self) -> bool:
        return not self.do_sample and len(self.processors) == 0

    def note(self, token_id: int) -> None:
        """Add a token to the history."""
        if self.history is not None:
            self.history[0, self.length] = token_id
        self.length += 1

    @property
    def can_run_ahead(self) -> bool:
        """Say whether the row's next token can be picked by who does not know the last one."""
        return self.greedy or (self.do_sample and self.is_usual and self.history is None)

    @property
    def so_far(self) -> Tensor:
        """Prompt and answer so far, (1, length)."""
        assert self.history is not None
        return self.history[:, : self.length]


_USUAL = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
_BLIND = frozenset(_USUAL[1:])
"""Processors that never look at the tokens so far."""


def sequence_sampler(model: MistralForCausalLM, prompt_ids: Sequence[int], sampling: SamplingParams) -> SequenceSampler:
    """Build a row's sampler the way `generate` builds its own, from the same configuration.

    Raises:
        BadRequest: Transformers refuses the combination.
    """
    try:
        config = generation_config(model, len(prompt_ids), sampling)
        prompt = torch.tensor([list(prompt_ids)], device=model.device)
        processors = model._get_logits_processor(
            config, input_ids_seq_length=len(prompt_ids), encoder_input_ids=prompt, device=model.device
        )
    except (ValueError, TypeError) as error:
        raise BadRequest(f"The parameters cannot be used together: {error}") from error
    if sampling.frequency_penalty or sampling.presence_penalty:
        penalty = CountPenalty(len(prompt_ids), sampling.frequency_penalty, sampling.presence_penalty)
        processors = LogitsProcessorList([penalty, *processors])
    generator = None
    if sampling.seed is not None and config.do_sample:
        generator = torch.Generator(model.device).manual_seed(sampling.seed)
    history = None
    if any(type(p) not in _BLIND for p in processors):
        history = torch.empty((1, len(prompt_ids) + sampling.max_new_tokens), dtype=torch.long, device=model.device)
        history[:, : len(prompt_ids)] = prompt
    eos = config._eos_token_tensor
    return SequenceSampler(
        processors=processors,
        do_sample=bool(config.do_sample),
        eos_token_ids=frozenset(eos.tolist()) if eos is not None else frozenset(),
        max_time_s=config.max_time,
        generator=generator,
        history=history,
        length=len(prompt_ids),
    )


def generation_config(model: MistralForCausalLM, num_prompt_tokens: int, sampling: SamplingParams) -> GenerationConfig:
    """Return what `generate` would work from: the request's fields over the model's own, lengths resolved."""
    config, _ = model._prepare_generation_config(None, **sampling.generate)
    config.max_new_tokens = sampling.max_new_tokens
    config.max_length = num_prompt_tokens + sampling.max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = num_prompt_tokens + config.min_new_tokens
    config.validate()
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device, batch_size=1)
    return config


class SampledTokens:
    """The tokens of a step's rows: some on their way from the device, some known already."""

    def __init__(self, num_rows: int, of_rows: Sequence[int], tokens: Tensor | None) -> None:
        """Take the tokens of some of the rows, (len(of_rows),); `alone` is for the others."""
        self.alone: dict[int, int | ServeError] = {}
        self.on_device = tokens if list(of_rows) == list(range(num_rows)) else None
        """(rows,): what a next step can be fed with before anybody reads it; None where it is not all there."""
        self._of_rows = of_rows
        self._arriving = None if tokens is None else AsyncHostCopy(tokens)

    def read(self) -> list[int | ServeError]:
        """Wait for the step; return a token for each row, or what is wrong with one that has none to choose."""
        found = dict(self.alone)
        if self._arriving is not None:
            found.update(zip(self._of_rows, self._arriving.read(), strict=True))
        return [found[i] for i in range(len(found))]


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SequenceSampler], shared: torch.Generator) -> SampledTokens:
    """Pick each row's next token.

    Args:
        logits: (rows, vocab_size) in float32; may be changed.
        shared: randomness for rows without a seed.
    """
    greedy = [i for i, row in enumerate(rows) if row.greedy]
    together = [i for i, row in enumerate(rows) if row.do_sample and row.is_usual]
    # Rows with a small top_k need only a few candidates; one row without must not make all of them sort the vocabulary.
    few = [i for i in together if _top_k(rows[i]) <= CANDIDATES - TIES]
    many = [i for i in together if i not in few]
    groups = [group for group in (greedy, few, many) if group]
    tokens = []
    for group in groups:
        of_group = logits if len(group) == len(rows) else logits[to_device(group, logits.device)]
        if group is greedy:
            tokens.append(of_group.argmax(-1))
        else:
            num_candidates = logits.shape[-1] if group is many else min(CANDIDATES, logits.shape[-1])
            tokens.append(_sample_together(of_group, [rows[i] for i in group], num_candidates, shared))
    of_rows = [i for group in groups for i in group]
    picked = SampledTokens(len(rows), *_in_order(of_rows, tokens))
    for i in sorted(set(range(len(rows))).difference(of_rows)):
        picked.alone[i] = _sample_alone(logits[i : i + 1], rows[i], shared)
    return picked


def _in_order(of_rows: Sequence[int], tokens: Sequence[Tensor]) -> tuple[Sequence[int], Tensor | None]:
    """Return which rows there are, ascending, and their tokens in one tensor."""
    if len(tokens) < 2:
        return of_rows, tokens[0] if tokens else None
    order = sorted(range(len(of_rows)), key=of_rows.__getitem__)
    together = torch.cat(tuple(tokens))
    return sorted(of_rows), together[to_device(order, together.device)]


def _top_k(row: SequenceSampler) -> int:
    warper = row.usual.get(TopKLogitsWarper)
    return warper.top_k if warper is not None else 1 << 30


def _sample_alone(logits: Tensor, row: SequenceSampler, shared: torch.Generator) -> int | ServeError:
    try:
        # Without a history no processor looks at one.
        history = row.so_far if row.history is not None else torch.empty((1, 0), dtype=torch.long)
        scores = row.processors(history, logits.clone())
    except Exception:
        logger.exception("a request's logits processors failed")
        return InternalError()
    if not row.do_sample:
        return int(scores.argmax(-1))
    probs = scores.softmax(-1)
    if bool(probs.isnan().any()):
        return BadRequest("The parameters together forbid every token; loosen one of them.")
    return int(_draw(probs, None, [row], shared, logits.shape[-1]))


def _sample_together(
    logits: Tensor,
    rows: Sequence[SequenceSampler],
    num_candidates: int,
    shared: torch.Generator,
) -> Tensor:
    """Sample rows with usual processors: the same steps as Transformers', on sorted candidates."""

    def values(kind: type, name: str, default: float) -> list[float]:
        return [getattr(row.usual[kind], name) if kind in row.usual else default for row in rows]

    def column(of_rows: Sequence[float]) -> Tensor:
        return to_device(of_rows, logits.device)[:, None]

    vocab_size = logits.shape[-1]
    for i, row in enumerate(rows):
        penalty = row.usual.get(RepetitionPenaltyLogitsProcessor)
        if penalty is not None:
            logits[i : i + 1] = penalty(row.so_far, logits[i : i + 1])
    logits = logits / column(values(TemperatureLogitsWarper, "temperature", 1.0))
    scores, ids = logits.topk(num_candidates, dim=-1)
    top_k = column(values(TopKLogitsWarper, "top_k", vocab_size)).clamp(max=num_candidates)
    scores = scores.masked_fill(scores < scores.gather(-1, top_k - 1), -torch.inf)
    # Ascending, as Transformers sums them: the smallest first, the likeliest token always kept.
    scores, ids = scores.flip(-1), ids.flip(-1)
    # Asked of the numbers here and not of the tensors: a GPU would be waited for.
    top_ps, min_ps = values(TopPLogitsWarper, "top_p", 1.0), values(MinPLogitsWarper, "min_p", 0.0)
    if min(top_ps) < 1:
        top_p = column(top_ps)
        cut = (scores.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
        cut[:, -1] = False
        scores = scores.masked_fill(cut, -torch.inf)
    if max(min_ps) > 0:
        min_p = column(min_ps)
        probs = scores.softmax(-1)
        cut = probs < min_p * probs[:, -1:]
        cut[:, -1] = False
        scores = scores.masked_fill(cut, -torch.inf)
    return _draw(scores.softmax(-1), ids, rows, shared, vocab_size)


def _draw(
    probs: Tensor, ids: Tensor | None, rows: Sequence[SequenceSampler], shared: torch.Generator, vocab_size: int
) -> Tensor:
    """Draw one token a row from (rows, candidates) probabilities.

    An exponential race, which is how `torch.multinomial` draws a single sample: the largest probability / Exp(1) wins.
    A seeded row runs it over the whole vocabulary, so that its numbers do not depend on how many candidates there were.
    """
    times = torch.empty_like(probs).exponential_(generator=shared)
    for i, row in enumerate(rows):
        if row.generator is not None:
            all_times = torch.empty(vocab_size, device=probs.device).exponential_(generator=row.generator)
            times[i] = all_times if ids is None else all_times[ids[i]]
    winners = (probs / times).argmax(-1, keepdim=True)
    return (winners if ids is None else ids.gather(-1, winners)).squeeze(-1)


def with_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[Token]:
    """Return tokens with their log-probabilities under raw logits (tokens, vocab_size)."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(list(token_ids), device=logits.device)[:, None]).squeeze(-1)
    top_values, top_ids = logprobs.topk(num_top, dim=-1)
    return [
        Token(id=token_id, logprob=logprob, top=tuple(zip(top, values, strict=True)))
        for token_id, logprob, top, values in zip(
            token_ids, chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True
        )
    ]
