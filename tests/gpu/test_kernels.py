"""Flash attention, CUDA graphs and copies: they run without a fallback and match plain attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.cuda_graphs import StaticStep
from model_server.compute.gpu.host_device import AsyncHostCopy, to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache
from model_server.compute.kv_cache.flash_check import verify_flash_attention
from model_server.compute.runner import Runner
from tests.gpu.conftest import NO_CARD
from tests.support.fake_gpu import CUDA, FakeGPU
from tests.support.tiny_model import tiny_mistral

MAX_SEQUENCE_TOKENS = 256


@dataclass
class Card:
    """A model on a GPU or on its stand-in."""

    model: MistralForCausalLM

    @property
    def device(self) -> torch.device:
        return self.model.device

    def runner(self, *, flash: bool = True) -> Runner:
        cache = ContiguousKVCache(
            self.model.config,
            num_tokens=2000,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
            dtype=self.model.dtype,
            device=self.device,
            flash=flash,
        )
        return Runner(self.model, cache)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def card(request: pytest.FixtureRequest, device: torch.device) -> Card:
    model = tiny_mistral(head_dim=128).to(device, request.param)
    fuse(model)
    return Card(model)


def logits_of(runner: Runner) -> torch.Tensor:
    """Prefill three prompts and decode four tokens of each; return the logits of every step, concatenated."""
    lengths = [3, 70, 150]
    offsets = [runner.kv_cache.allocate(MAX_SEQUENCE_TOKENS) or 0 for _ in lengths]
    prompts = [
        TokenRange(offset, 0, [(7 * i + length) % 290 + 5 for i in range(length)])
        for offset, length in zip(offsets, lengths, strict=True)
    ]
    last = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
    logits = [runner.forward([], prompts, last)]
    for step in range(4):
        decode = [
            TokenRange(offset, length + step, [20 + step]) for offset, length in zip(offsets, lengths, strict=True)
        ]
        logits.append(runner.forward(decode, [], range(len(decode))))
    return torch.cat(logits).cpu()


def test_no_fallback_is_taken(card: Card) -> None:
    mistral_7b = MistralConfig(head_dim=128)
    runner = card.runner()
    runner.capture_graphs(8)

    assert verify_flash_attention(mistral_7b, card.model.dtype, card.device) is None
    assert runner.graphs is not None
    assert runner.missing_features == []


@pytest.mark.parametrize("graphs", [False, True])
def test_flash_attention_and_graphs_give_what_plain_attention_gives(
    card: Card, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_with_graph: list[bool] = []
    run = StaticStep.run

    def recording(step: StaticStep, decode: list[TokenRange], tokens: torch.Tensor | None = None) -> torch.Tensor:
        runs_with_graph.append(step.is_captured)
        return run(step, decode, tokens)

    monkeypatch.setattr(StaticStep, "run", recording)
    runner = card.runner()
    if graphs:
        runner.capture_graphs(8)

    difference = (logits_of(runner) - logits_of(card.runner(flash=False))).abs().max()

    assert float(difference) < 0.2
    assert runs_with_graph == [True] * 4 * graphs


def test_steps_give_the_models_own_logits(card: Card) -> None:
    """Transformers' forward shares no code with this server's KV cache; logits reach 5."""
    tokens = [*((7 * i + 70) % 290 + 5 for i in range(70)), 20, 21]
    expected = card.model(torch.tensor([tokens], device=card.device)).logits[0, 69:].float()
    runner = card.runner()
    runner.capture_graphs(2)
    offset = runner.kv_cache.allocate(MAX_SEQUENCE_TOKENS) or 0

    prefilled = runner.forward([], [TokenRange(offset, 0, tokens[:70])], [69])
    decoded = [runner.forward([TokenRange(offset, at, tokens[at : at + 1])], [], [0]) for at in (70, 71)]

    assert float((torch.cat([prefilled, *decoded]) - expected).abs().max()) < 0.4


def test_chunk_inside_a_prompt_runs_without_logits(card: Card) -> None:
    runner = card.runner()
    offset = runner.kv_cache.allocate(MAX_SEQUENCE_TOKENS) or 0

    assert runner.forward([], [TokenRange(offset, 0, list(range(5, 75)))], []).shape == (0, 300)


def test_copied_prefix_reads_as_the_original(card: Card) -> None:
    runner = card.runner()
    runner.capture_graphs(2)
    original, copy = (runner.kv_cache.allocate(MAX_SEQUENCE_TOKENS) or 0 for _ in range(2))
    runner.forward([], [TokenRange(original, 0, list(range(5, 105)))], [99])

    runner.kv_cache.copy(original, copy, 100)
    first, second = runner.forward([TokenRange(offset, 100, [7]) for offset in (original, copy)], [], range(2))

    assert torch.equal(first, second)


@pytest.mark.parametrize("graphs", [False, True])
def test_step_fed_on_the_device_equals_one_fed_by_the_host(card: Card, graphs: bool) -> None:
    runner = card.runner()
    if graphs:
        runner.capture_graphs(4)
    offsets = [runner.kv_cache.allocate(MAX_SEQUENCE_TOKENS) or 0 for _ in range(3)]
    decode = [TokenRange(offset, 0, [20 + i]) for i, offset in enumerate(offsets)]
    unknown = [TokenRange(offset, 0, [0]) for offset in offsets]

    by_host = runner.forward(decode, [], range(3))
    on_device = runner.forward(unknown, [], range(3), to_device([20, 21, 22], card.device))

    assert torch.equal(on_device, by_host)


@pytest.mark.gpu
@NO_CARD
def test_copies_do_not_wait_for_later_work() -> None:
    device = torch.device("cuda")
    AsyncHostCopy(to_device([1], device)).read()  # allocates the pinned memory that the next copy reuses

    copy = AsyncHostCopy(to_device([3, 1, 2], device).flip(0))
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    (later := torch.cuda.Event()).record()
    fed = to_device([5], device)

    assert copy.read() == [2, 1, 3]
    assert not later.query()
    assert fed.tolist() == [5]


def test_waiting_for_a_step_sleeps_instead_of_spinning(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an event that is not blocking, `cudaEventSynchronize` spins and uses up a core."""
    made: list[dict[str, bool]] = []
    event: Callable[..., object] = torch.cuda.Event
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: made.append(options) or event(**options))

    AsyncHostCopy(torch.zeros(2, device=CUDA)).wait()

    assert made == [{"blocking": True}]
