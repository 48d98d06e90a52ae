"""Samples token ids from logits, with each sequence's own parameters.

Transformers' logits processors apply the parameters of a sequence (`sequence_sampler`). Sequences with batchable
processors are sampled together; the others run their processors one by one. Sampling follows `torch.multinomial`
exactly: a sequence with a seed gets the same tokens as `torch.manual_seed(seed)` and `generate`, in any batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model_server.compute.gpu.host_device import AsyncHostCopy, to_device
from model_server.compute.logprobs import TokenLogprobs
from model_server.compute.sequence_sampler import PENALTIES, SequenceSampler
from model_server.compute.token_mask import TokenMask, only_allowed
from model_server.errors import BadRequest, InternalError, ServeError
from model_server.request import Token

logger = logging.getLogger(__name__)

CANDIDATES = 256
"""Sequences with a small top_k are sampled from this many tokens instead of the whole vocabulary."""
TIES = 32
"""Spare candidates beyond top_k: Transformers keeps every token that ties with the last one."""


class SampledTokens:
    """The sampled tokens of a step, one for each sequence; the device copies them to the host asynchronously."""

    def __init__(self, num_sequences: int, batched: Sequence[int], tokens: Tensor) -> None:
        """Start the copy of the tokens to the host.

        Reading waits for the step even if it has no tokens.

        Args:
            batched: the indices of the sequences that were sampled together; `unbatched` holds the others.
            tokens: (len(batched),).
        """
        self.unbatched: dict[int, int | ServeError] = {}
        self.errors: Mapping[int, ServeError] = {}
        """Sequences that get an error instead of a token, by index."""
        self.on_device = tokens if list(batched) == list(range(num_sequences)) else None
        """(sequences,): the input of the next step before the host has read it; None unless all were batched."""
        self._batched, self._tokens = batched, tokens
        self._copy = AsyncHostCopy(tokens)
        self._with_logprobs: Sequence[int] = ()
        self._logprobs: TokenLogprobs | None = None

    def read(self) -> list[int | ServeError]:
        """Wait for the step; return a token for each sequence, or an error if no token can be chosen."""
        tokens = dict(self.unbatched)
        tokens.update(zip(self._batched, self._copy.read(), strict=True))
        tokens.update(self.errors)
        return [tokens[i] for i in range(len(tokens))]

    def read_logprobs(self) -> dict[int, Token]:
        """Wait for the step; return the tokens of the sequences that report log-probabilities, by index."""
        return {} if self._logprobs is None else dict(zip(self._with_logprobs, self._logprobs.read(), strict=True))

    def add_logprobs(self, logits: Tensor, samplers: Sequence[SequenceSampler]) -> None:
        """Compute the log-probabilities of all sequences that report them, from raw logits, in one call."""
        num_top = {i: s.num_logprobs for i, s in enumerate(samplers) if s.num_logprobs is not None}
        for i, token in self.unbatched.items():
            if isinstance(token, ServeError):
                num_top.pop(i, None)
        if not num_top:
            return
        self._with_logprobs = list(num_top)
        token_ids = self._on_device(len(samplers), logits.device)
        if len(num_top) < len(samplers):
            which = to_device(self._with_logprobs, logits.device)
            logits, token_ids = logits[which], token_ids[which]
        self._logprobs = TokenLogprobs(logits, token_ids, list(num_top.values()))

    def append_to(self, samplers: Sequence[SequenceSampler]) -> None:
        """Append the tokens to the histories of the samplers, on the device."""
        for row, i in enumerate(self._batched):
            if samplers[i].history is not None:
                samplers[i].append(self._tokens[row])
        for i, token in self.unbatched.items():
            if not isinstance(token, ServeError):
                samplers[i].append(token)

    def _on_device(self, num_sequences: int, device: torch.device) -> Tensor:
        """Return the tokens of all sequences, 0 in place of an error."""
        if self.on_device is not None:
            return self.on_device
        known = [token if isinstance(token, int) else 0 for token in map(self.unbatched.get, range(num_sequences))]
        token_ids = to_device(known, device, torch.long)
        if self._batched:
            token_ids[to_device(self._batched, device, torch.long)] = self._tokens
        return token_ids


@torch.inference_mode()
def sample(
    logits: Tensor, samplers: Sequence[SequenceSampler], shared: torch.Generator, mask: TokenMask | None = None
) -> SampledTokens:
    """Choose each sequence's next token and append it to the sequence's history.

    If sampling fails, generators and histories are unchanged, so that the step can be repeated.

    Args:
        logits: (sequences, vocab_size) in float32.
        shared: the random generator of sequences without a seed.
        mask: the tokens that grammars allow; None if no sequence has a grammar.
    """
    states = [(s.generator, s.generator.get_state()) for s in samplers if s.generator is not None]
    try:
        return _sample(logits, samplers, shared, mask)
    except Exception:
        for generator, state in states:
            generator.set_state(state)
        raise


def _sample(
    raw_logits: Tensor, samplers: Sequence[SequenceSampler], shared: torch.Generator, mask: TokenMask | None
) -> SampledTokens:
    # The mask comes before the processors, so that a processor that excludes tokens never excludes all allowed tokens.
    logits = raw_logits if mask is None else mask.apply(raw_logits)
    greedy, plain, few, many = [], [], [], []
    for i, sampler in enumerate(samplers):
        if not sampler.batchable:
            continue
        if not sampler.do_sample:
            greedy.append(i)
        elif not sampler.truncates:
            plain.append(i)
        # A sequence with a small top_k needs few candidates; only the others have to sort the whole vocabulary.
        elif _top_k(sampler) <= CANDIDATES - TIES:
            few.append(i)
        else:
            many.append(i)
    scores = _penalized(logits, samplers)
    tokens = []
    groups = [group for group in (greedy, plain, few, many) if group]
    for group in groups:
        of_group = scores if len(group) == len(samplers) else scores[to_device(group, scores.device)]
        of_samplers = [samplers[i] for i in group]
        if group is greedy:
            tokens.append(of_group.argmax(-1))
        elif group is plain:
            tokens.append(_draw((of_group / _temperatures(of_samplers, scores)).softmax(-1), None, of_samplers, shared))
        else:
            num_candidates = min(CANDIDATES, scores.shape[-1]) if group is few else None
            tokens.append(_sample_truncated(of_group, of_samplers, num_candidates, shared))
    batched = [i for group in groups for i in group]
    if not tokens:
        tokens = [torch.empty(0, dtype=torch.long, device=scores.device)]
    sampled = SampledTokens(len(samplers), *_in_order(batched, tokens))
    for i in sorted(set(range(len(samplers))).difference(batched)):
        constrained = mask is not None and i in mask.indices
        sampled.unbatched[i] = _sample_unbatched(logits[i : i + 1], samplers[i], shared, constrained=constrained)
    if mask is not None:
        sampled.errors = mask.errors
    sampled.add_logprobs(raw_logits, samplers)
    sampled.append_to(samplers)
    return sampled


def _penalized(logits: Tensor, samplers: Sequence[SequenceSampler]) -> Tensor:
    """Return the logits after the batchable penalties, which read the tokens of each sequence."""
    penalties = [(i, s, p) for i, s in enumerate(samplers) if s.batchable for p in s.processors if type(p) in PENALTIES]
    if not penalties:
        return logits
    scores = logits.clone()
    for i, sampler, penalty in penalties:
        scores[i : i + 1] = penalty(sampler.tokens, scores[i : i + 1])
    return scores


def _in_order(batched: Sequence[int], tokens: Sequence[Tensor]) -> tuple[Sequence[int], Tensor]:
    """Return the indices of the sequences in ascending order and their tokens in one tensor."""
    if len(tokens) < 2:
        return batched, tokens[0]
    order = sorted(range(len(batched)), key=batched.__getitem__)
    joined = torch.cat(tuple(tokens))
    return sorted(batched), joined[to_device(order, joined.device)]


def _top_k(sampler: SequenceSampler) -> int:
    warper = sampler.by_type.get(TopKLogitsWarper)
    return warper.top_k if warper is not None else 1 << 30


def _sample_unbatched(
    logits: Tensor, sampler: SequenceSampler, shared: torch.Generator, *, constrained: bool
) -> int | ServeError:
    try:
        scores = sampler.processors(sampler.tokens, logits.clone())
    except Exception:
        logger.exception("a request's logits processors failed")
        return InternalError()
    if constrained:
        scores = only_allowed(scores, logits)
    if not sampler.do_sample:
        return int(scores.argmax(-1))
    probs = scores.softmax(-1)
    if bool(probs.isnan().any()):
        return BadRequest("The parameters together forbid every token; loosen one of them.")
    return int(_draw(probs, None, [sampler], shared))


def _values(samplers: Sequence[SequenceSampler], type_: type, name: str, default: float) -> list[float]:
    return [getattr(s.by_type[type_], name) if type_ in s.by_type else default for s in samplers]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(values, like.device)[:, None]


def _temperatures(samplers: Sequence[SequenceSampler], like: Tensor) -> Tensor:
    return _column(_values(samplers, TemperatureLogitsWarper, "temperature", 1.0), like)


def _sample_truncated(
    logits: Tensor, samplers: Sequence[SequenceSampler], num_candidates: int | None, shared: torch.Generator
) -> Tensor:
    """Sample sequences with top_k, top_p or min_p as Transformers does, from sorted candidates.

    Args:
        num_candidates: the number of candidates; None uses the whole vocabulary.
    """
    logits = logits / _temperatures(samplers, logits)
    # In ascending order, as Transformers sums the probabilities. The last, likeliest token is always kept.
    if num_candidates is None:
        scores, ids = logits.sort(dim=-1)
    else:
        scores, ids = logits.topk(num_candidates, dim=-1)
        scores, ids = scores.flip(-1), ids.flip(-1)
    # The limits are compared on the host: reading a tensor would wait for the device.
    top_ks = [min(int(k), scores.shape[-1]) for k in _values(samplers, TopKLogitsWarper, "top_k", scores.shape[-1])]
    top_ps, min_ps = (
        _values(samplers, TopPLogitsWarper, "top_p", 1.0),
        _values(samplers, MinPLogitsWarper, "min_p", 0.0),
    )
    if min(top_ks) < scores.shape[-1]:
        last = scores.gather(-1, scores.shape[-1] - _column(top_ks, scores))
        scores = scores.masked_fill(scores < last, -torch.inf)
    if min(top_ps) < 1:
        top_p = _column(top_ps, scores)
        cut = (scores.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
        cut[:, -1] = False
        scores = scores.masked_fill(cut, -torch.inf)
    if max(min_ps) > 0:
        min_p = _column(min_ps, scores)
        probs = scores.softmax(-1)
        cut = probs < min_p * probs[:, -1:]
        cut[:, -1] = False
        scores = scores.masked_fill(cut, -torch.inf)
    return _draw(scores.softmax(-1), ids, samplers, shared, logits.shape[-1])


def _draw(
    probs: Tensor,
    ids: Tensor | None,
    samplers: Sequence[SequenceSampler],
    shared: torch.Generator,
    vocab_size: int | None = None,
) -> Tensor:
    """Draw one token per sequence from the probabilities (sequences, candidates).

    `torch.multinomial` draws a single sample as an exponential race: the largest probability / Exp(1) wins. A sequence
    with a seed draws random numbers for the whole vocabulary, so they do not depend on the number of candidates.

    Args:
        ids: the token ids of the candidates; None if the candidates are the whole vocabulary.
    """
    times = torch.empty_like(probs).exponential_(generator=shared)
    for i, sampler in enumerate(samplers):
        if sampler.generator is not None:
            num_times = vocab_size or probs.shape[-1]
            all_times = torch.empty(num_times, device=probs.device).exponential_(generator=sampler.generator)
            times[i] = all_times if ids is None else all_times[ids[i]]
    winners = (probs / times).argmax(-1, keepdim=True)
    return (winners if ids is None else ids.gather(-1, winners)).squeeze(-1)
