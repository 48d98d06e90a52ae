"""What only a GPU shows: flash attention over spans and recorded decode steps give what plain PyTorch gives.

Run on a machine with one: `make test`, or `pytest tests/test_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import MistralForCausalLM

from model_server.compute.cuda_graphs import StaticStep
from model_server.compute.fused_linear import fuse
from model_server.compute.host_device import AsyncHostCopy, to_device
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.kv_cache.contiguous import ContiguousKVCache, flash_attention_unavailable_reason
from model_server.compute.runner import Runner
from tests.support.tiny_model import tiny_mistral

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

MAX_ROW_TOKENS = 256


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def on_gpu(request: pytest.FixtureRequest) -> Iterator[MistralForCausalLM]:
    model = tiny_mistral(head_dim=128).to(torch.device("cuda"), request.param)
    fuse(model)
    yield model
    torch.cuda.empty_cache()


@pytest.fixture
def make_runner(on_gpu: MistralForCausalLM) -> Callable[[bool], Runner]:
    def make(flash: bool) -> Runner:
        spans = ContiguousKVCache(
            on_gpu.config,
            num_tokens=2000,
            max_sequence_tokens=MAX_ROW_TOKENS,
            dtype=on_gpu.dtype,
            device=on_gpu.device,
            flash=flash,
        )
        return Runner(on_gpu, spans)

    return make


def logits_of(runner: Runner) -> torch.Tensor:
    """Read three prompts and decode four tokens in each: the logits of every step, one below the other."""
    lengths = [3, 70, 150]
    places = [runner.kv_cache.allocate(MAX_ROW_TOKENS) or 0 for _ in lengths]
    prompts = [
        TokenRange(place, 0, [(7 * i + length) % 290 + 5 for i in range(length)])
        for place, length in zip(places, lengths, strict=True)
    ]
    ends = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
    found = [runner.forward([], prompts, ends)]
    for step in range(4):
        decode = [TokenRange(place, length + step, [20 + step]) for place, length in zip(places, lengths, strict=True)]
        found.append(runner.forward(decode, [], range(len(decode))))
    return torch.cat(found).cpu()


def test_this_card_computes_flash_attention_over_spans(on_gpu: MistralForCausalLM) -> None:
    assert flash_attention_unavailable_reason(on_gpu.config, on_gpu.dtype, on_gpu.device) is None


@pytest.mark.parametrize("graphs", [False, True])
def test_flash_attention_and_graphs_give_what_plain_attention_gives(
    make_runner: Callable[[bool], Runner], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = []
    run = StaticStep.run
    monkeypatch.setattr(StaticStep, "run", lambda step, decode: replayed.append(step._graph) or run(step, decode))
    runner = make_runner(True)
    if graphs:
        runner.record_graphs(8)

    difference = (logits_of(runner) - logits_of(make_runner(False))).abs().max()

    assert float(difference) < 0.2
    assert [graph is not None for graph in replayed] == [True] * 4 * graphs


def test_steps_give_the_models_own_logits(make_runner: Callable[[bool], Runner], on_gpu: MistralForCausalLM) -> None:
    """Against Transformers' forward, which knows nothing of how keys and values are written here; logits go up to 5."""
    tokens = [*((7 * i + 70) % 290 + 5 for i in range(70)), 20, 21]
    wanted = on_gpu(torch.tensor([tokens], device=on_gpu.device)).logits[0, 69:].float()
    runner = make_runner(True)
    runner.record_graphs(2)
    place = runner.kv_cache.allocate(MAX_ROW_TOKENS) or 0

    read = runner.forward([], [TokenRange(place, 0, tokens[:70])], [69])
    decoded = [runner.forward([TokenRange(place, at, tokens[at : at + 1])], [], [0]) for at in (70, 71)]

    assert float((torch.cat([read, *decoded]) - wanted).abs().max()) < 0.4


def test_a_copied_beginning_is_read_as_the_original(make_runner: Callable[[bool], Runner]) -> None:
    runner = make_runner(True)
    runner.record_graphs(2)
    original, copy = (runner.kv_cache.allocate(MAX_ROW_TOKENS) or 0 for _ in range(2))
    runner.forward([], [TokenRange(original, 0, list(range(5, 105)))], [99])

    runner.kv_cache.copy(original, copy, 100)
    first, second = runner.forward([TokenRange(place, 100, [7]) for place in (original, copy)], [], range(2))

    assert torch.equal(first, second)


def test_numbers_cross_without_waiting_for_what_is_launched_later() -> None:
    device = torch.device("cuda")
    AsyncHostCopy(to_device([1], device)).read()  # from here on, there is pinned memory to take

    arriving = AsyncHostCopy(to_device([3, 1, 2], device).flip(0))
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    (computed := torch.cuda.Event()).record()
    fed = to_device([5], device)

    assert arriving.read() == [2, 1, 3]
    assert not computed.query()
    assert fed.tolist() == [5]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_fed_on_the_card_gives_what_one_fed_by_the_host_gives(
    make_runner: Callable[[bool], Runner], graphs: bool
) -> None:
    runner = make_runner(True)
    if graphs:
        runner.record_graphs(4)
    places = [runner.kv_cache.allocate(MAX_ROW_TOKENS) or 0 for _ in range(3)]
    decode = [TokenRange(place, 0, [20 + i]) for i, place in enumerate(places)]
    unknown = [TokenRange(place, 0, [0]) for place in places]

    by_host = runner.forward(decode, [], range(3))
    on_card = runner.forward(unknown, [], range(3), to_device([20, 21, 22], torch.device("cuda")))

    assert torch.equal(on_card, by_host)
