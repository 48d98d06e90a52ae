"""KV memory: what is reserved, who waits for it, and that attention over spans is attention."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralForCausalLM

from model_server.compute.cuda_graphs import DecodeGraphs, sizes_up_to
from model_server.compute.fused_linear import fuse, pack
from model_server.compute.kv_cache import contiguous as spans_module
from model_server.compute.kv_cache.base import kv_bytes_per_token
from model_server.compute.kv_cache.budget import plan
from model_server.compute.kv_cache.contiguous import (
    ContiguousKVCache,
    FreeListAllocator,
    flash_attention_unavailable_reason,
    verify_flash_attention,
)
from model_server.engine.engine import Engine
from model_server.errors import BadRequest, QueueFull, StartupError
from tests.engine.test_oracle import GREEDY, OWN_LANE, SHARED_LANE, answer, expected, prompt
from tests.support.engine_requests import Gate, events, request, until
from tests.support.tiny_model import tiny_mistral

CPU = torch.device("cpu")
MakeEngine = Callable[..., Engine]


def spans_for(
    model: MistralForCausalLM, num_tokens: int = 900, max_sequence_tokens: int = 256, *, flash: bool = False
) -> ContiguousKVCache:
    return ContiguousKVCache(
        model.config,
        num_tokens=num_tokens,
        max_sequence_tokens=max_sequence_tokens,
        dtype=model.dtype,
        device=model.device,
        flash=flash,
    )


def attention_as_documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` says of itself, in plain arithmetic; the kernel is CUDA's alone.

    Causal masks and windows are aligned to the last key, as FlashAttention aligns them.
    """
    assert enable_gqa
    assert {cu_seq_q.dtype, cu_seq_k.dtype, seqused_k.dtype} == {torch.int32}
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1
    out = torch.empty_like(query)
    left, right = window_size
    for row, used in enumerate(seqused_k.tolist()):
        first, last = cu_seq_q[row : row + 2].tolist()
        start = int(cu_seq_k[row])
        assert last - first <= max_q
        assert used <= max_k
        keys, values = (
            t[start : start + used].repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[first:last], keys) * scale
        distance = torch.arange(used) - torch.arange(used - (last - first), used)[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if right >= 0:
            hidden |= distance > right
        if left >= 0:
            hidden |= distance < -left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


@pytest.fixture(params=["plain", "flash", "graphs"])
def over_spans(request: pytest.FixtureRequest, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """A factory of engines over spans: plain attention, flash attention's call, and static steps besides."""
    monkeypatch.setattr(spans_module, "varlen_attn", attention_as_documented)

    def make(model: MistralForCausalLM, **changes: Any) -> Engine:
        memory = spans_for(model, flash=request.param != "plain")
        engine = make_engine(model, memory=memory, **changes)
        runner = engine._shared.runner
        runner.is_async = True  # steps are launched as on a GPU, before the tokens of the last are read
        if request.param == "graphs":
            runner._graphs = DecodeGraphs(runner._decoder, memory, engine._shared.scheduler._max_batch_size)
        return engine

    return make


def test_spans_never_overlap_and_join_again() -> None:
    """A thousand random requests against a map of every token: in turn while most is free, else where it is tight."""
    numbers = random.Random(0)
    free = FreeListAllocator(500)
    taken: dict[int, int] = {}
    last_end = 0
    for _ in range(1000):
        if taken and numbers.random() < 0.5:
            start = numbers.choice(list(taken))
            free.free(start, taken.pop(start))
            continue
        length = numbers.randint(1, 120)
        used = {token for start, held in taken.items() for token in range(start, start + held)}
        fitting = [start for start in range(500 - length + 1) if used.isdisjoint(range(start, start + length))]
        if len(used) < 500 / 3:
            wanted = min(fitting, key=lambda token: (token < last_end, token), default=None)
        else:
            firsts = [token for token in fitting if token == 0 or token - 1 in used]
            ends = {token: next(end for end in range(token, 501) if end == 500 or end in used) for token in firsts}
            wanted = min(firsts, key=lambda token: ends[token] - token, default=None)
        start = free.allocate(length)
        assert start == wanted
        if start is not None:
            taken[start] = length
            last_end = start + length if len(used) < 500 / 3 else last_end
    for start, length in taken.items():
        free.free(start, length)
    assert free.allocate(500) == 0


def test_rows_are_counted_as_they_would_be_taken(model: MistralForCausalLM) -> None:
    spans = spans_for(model, num_tokens=100)
    first, _, third = (spans.allocate(30) for _ in range(3))
    assert (first, third) == (0, 60)
    spans.free(0)

    assert spans.num_allocatable([20, 10, 10]) == 3
    assert spans.num_allocatable([35, 1]) == 0
    assert spans.allocate(35) is None
    assert spans.allocate(30) == 0


async def test_answers_over_spans_equal_generate(plain_model: Any, model: Any, over_spans: MakeEngine) -> None:
    """Rows of every kind, joining and leaving: the batch of the oracle, in memory that is never empty enough."""
    engine = over_spans(model, max_batch_size=6)
    jobs = [
        (prompt(3 + 17 * (i % 10)), 8 + 3 * (i % 5), fields) for i, fields in enumerate([*SHARED_LANE, OWN_LANE[0]])
    ]

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == [expected(plain_model, *job) for job in jobs]
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0)
    assert engine._kv_cache.num_allocatable([engine._kv_cache.num_tokens]) == 1


@pytest.mark.parametrize("changes", [{"sliding_window": 13}, {"head_dim": 32}, {"num_key_value_heads": 4}], ids=str)
async def test_every_shape_over_spans_equals_generate(over_spans: MakeEngine, changes: dict[str, Any]) -> None:
    model = tiny_mistral(**changes)
    jobs = [(prompt(n), 30, GREEDY) for n in (2, 20, 90)]
    wanted = [expected(model, *job) for job in jobs]
    fuse(model)
    pack(model)

    engine = over_spans(model)

    answers = await asyncio.gather(*(answer(engine, *job) for job in jobs))

    assert [ids for ids, _ in answers] == wanted


async def test_a_request_whose_memory_is_not_free_waits_and_is_not_passed(
    make_engine: MakeEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, memory=spans_for(model, num_tokens=100), max_batch_size=4)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    rows_of_steps: list[int] = []
    gate.fault = lambda decode, prefill: rows_of_steps.append(len(decode) + len(prefill))
    first, large, small = request(57), request(77), request(7)
    engine.submit([first])
    await until(lambda: engine.running == 1)
    engine.submit([large])
    engine.submit([small])

    assert (engine.running, engine.waiting) == (1, 2)
    assert engine.kv_usage == pytest.approx(0.6)
    gate.open.set()
    await events(first, large, small)
    # 40 tokens are free all the while, and `small` wants 10: it enters with `large`, not before.
    assert rows_of_steps == [1] * 57 + [2] * 7 + [1] * 70
    assert engine.kv_usage == 0


async def test_what_waits_for_memory_counts_as_waiting(
    make_engine: MakeEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, memory=spans_for(model, num_tokens=100), max_batch_size=4, max_queue_size=1)
    gate = Gate(engine, monkeypatch)
    gate.open.clear()
    one, two = request(57), request(77)
    engine.submit([one])
    engine.submit([two])

    with pytest.raises(QueueFull):
        engine.submit([request(77)])
    with pytest.raises(BadRequest, match="this server holds 256"):
        engine.submit([request(300)])
    gate.open.set()
    await events(one, two)


def test_flash_attention_is_not_used_without_a_gpu(model: MistralForCausalLM) -> None:
    assert flash_attention_unavailable_reason(model.config, torch.float16, CPU) == "the device is a cpu"


@pytest.mark.parametrize("window", [None, 4096])
def test_flash_attention_that_does_as_documented_is_trusted(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    config = tiny_mistral(sliding_window=window).config
    monkeypatch.setattr(spans_module, "varlen_attn", attention_as_documented)

    assert verify_flash_attention(config, torch.float32, CPU) is None


@pytest.mark.parametrize("argument", ["cu_seq_k", "seqused_k", "window_size"])
def test_flash_attention_that_ignores_an_argument_is_refused(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    def careless(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *lengths: int, **rest: Any) -> Tensor:
        if argument == "cu_seq_k":
            cu_k = torch.zeros_like(cu_k)
        elif argument == "seqused_k":
            rest["seqused_k"] = torch.full_like(rest["seqused_k"], 100)
        else:
            rest["window_size"] = (-1, -1)
        return attention_as_documented(q, k, v, cu_q, cu_k, *lengths, **rest)

    monkeypatch.setattr(spans_module, "varlen_attn", careless)

    refusal = verify_flash_attention(model.config, torch.float32, CPU)
    assert refusal is not None
    assert "differ" in refusal


@pytest.mark.parametrize("wrong", ["one token further", "keys as values"])
def test_keys_and_values_in_a_wrong_place_are_refused_though_both_attentions_read_them(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(spans_module, "varlen_attn", attention_as_documented)
    make = ContiguousKVCache.__init__

    def make_wrong(spans: ContiguousKVCache, *args: Any, **options: Any) -> None:
        make(spans, *args, **options)
        shifted = wrong == "one token further"
        spans.by_token = tuple(memory[1:] if shifted else memory.flip(1) for memory in spans.by_token)

    monkeypatch.setattr(ContiguousKVCache, "__init__", make_wrong)

    refusal = verify_flash_attention(model.config, torch.float32, CPU)
    assert refusal == "keys and values are not written where they are read"


def test_flash_attention_that_raises_is_refused_with_its_first_line(
    model: MistralForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **rest: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from ...")

    monkeypatch.setattr(spans_module, "varlen_attn", broken)

    refusal = verify_flash_attention(model.config, torch.float32, CPU)
    assert refusal == "FlashAttention only supports Ampere GPUs or newer."


@pytest.mark.parametrize(
    ("max_rows", "sizes"), [(1, [1]), (4, [1, 2, 4]), (12, [1, 2, 4, 8, 12]), (32, [1, 2, 4, 8, 16, 24, 32])]
)
def test_graph_sizes_end_with_the_largest_batch(max_rows: int, sizes: list[int]) -> None:
    assert sizes_up_to(max_rows) == sizes


@pytest.mark.parametrize(("equal_rows", "rows", "tokens"), [(True, 11, 11 * 4096), (False, 32, 48_000)])
def test_spans_hold_more_rows_than_slots_in_the_same_memory(equal_rows: bool, rows: int, tokens: int) -> None:
    """Mistral 7B in float16 on a card of 24 GB, with 64 KB of keys and 64 KB of values for each token."""
    config = tiny_mistral().config
    config.update({"num_hidden_layers": 32, "num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 128})
    assert kv_bytes_per_token(config, torch.float16) == 128 * 1024
    free_bytes = int(48_000 * 128 * 1024 / 0.75 / 0.9) + 2

    room = plan(
        config,
        torch.float16,
        torch.device("cuda"),
        free_bytes=free_bytes,
        max_model_len=4096,
        max_batch_size=32,
        equal_rows=equal_rows,
    )

    assert (room.num_rows, room.num_tokens) == (rows, tokens)


def test_less_memory_than_one_longest_row_is_refused_at_start() -> None:
    with pytest.raises(StartupError, match="choose a smaller --max_model_len"):
        plan(
            tiny_mistral().config,
            torch.float32,
            CPU,
            free_bytes=1 << 20,
            max_model_len=4096,
            max_batch_size=1,
            equal_rows=False,
        )
