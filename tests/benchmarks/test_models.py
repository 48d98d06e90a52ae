"""What is measured: checkpoints of random weights, prompts of exact lengths, and the loops that run on them."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import limits, models
from benchmarks.ceilings import Matmuls, shapes_of
from benchmarks.decoding import RunnerDecoder, our_loop, transformers_loop
from benchmarks.prompts import exact_prompts, plain_prompts
from benchmarks.thread_per_request import application
from benchmarks.wire import read_event
from model_server.compute.fused_linear import fuse


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.checkpoint("tiny", "float32", tmp_path_factory.mktemp("cache"))


def test_checkpoint_is_made_once(model_dir: Path) -> None:
    made = {path: path.stat().st_mtime_ns for path in model_dir.iterdir()}
    assert models.checkpoint("tiny", "float32", model_dir.parent) == model_dir
    assert {path: path.stat().st_mtime_ns for path in model_dir.iterdir()} == made
    assert [path.name for path in model_dir.parent.iterdir()] == [model_dir.name]


def test_answer_is_exactly_as_long_as_asked_and_every_token_is_a_word(model_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    inputs = tokenizer("baba", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20)[0, inputs.input_ids.shape[1] :]
    assert len(tokens) == 20
    assert len(tokenizer.decode(tokens, skip_special_tokens=True).split()) == 20


def test_prompts_have_exactly_the_tokens_asked_for_and_repeat_with_their_seed(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    prompts = exact_prompts(tokenizer, num_tokens=9, count=3, seed=5)
    assert {len(AutoTokenizer.from_pretrained(model_dir)(prompt).input_ids) for prompt in prompts} == {9}
    assert prompts == exact_prompts(tokenizer, num_tokens=9, count=3, seed=5)
    assert len(set(prompts)) == 3


def test_prompts_share_exactly_the_beginning_asked_for(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    rows = [tokenizer.encode(one).ids for one in exact_prompts(tokenizer, 30, count=8, seed=5, num_shared=21)]
    assert {len(row) for row in rows} == {30}
    assert [len({row[i] for row in rows}) > 1 for i in (20, 21)] == [False, True]


def test_plain_prompts_have_as_many_words_as_asked_for() -> None:
    assert [len(prompt.split()) for prompt in plain_prompts(7, count=2, seed=0)] == [7, 7]


def test_7b_shape_is_mistrals_own() -> None:
    shapes = shapes_of(models.mistral_config(models.SHAPES["7b"]), fused=True)
    assert 7.0e9 < sum(math.prod(shape) for shape in shapes) < 7.2e9  # 7.24 billion without the embedding table


@pytest.mark.parametrize("fused", [False, True])
def test_matmuls_are_all_of_the_models_weights_but_the_embedding_table(model_dir: Path, fused: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    if fused:
        fuse(model)
    made = Matmuls.made_for(model.config, torch.float32, "meta", fused=fused)
    own = Matmuls.of(model)

    assert sum(math.prod(shape) for shape in shapes_of(model.config, fused=fused)) == linear
    shapes = [[projection.weight.shape for projection, _ in matmuls._projections] for matmuls in (made, own)]
    assert shapes[0] == shapes[1] == [torch.Size(shape) for shape in shapes_of(model.config, fused=fused)]
    own.run(2)


def test_a_loops_matmuls_are_timed_in_turn_with_its_steps(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    happened: list[str] = []
    run, step = Matmuls.run, RunnerDecoder.step
    monkeypatch.setattr(Matmuls, "run", lambda matmuls, rows: happened.append(f"{rows} rows") or run(matmuls, rows))
    monkeypatch.setattr(RunnerDecoder, "step", lambda decoder: happened.append("step") or step(decoder))
    plan = limits.Plan("cpu", "tiny", "float32", (), (), rows=(2,), steps=3, context=4)

    decode, _ = limits._decode(our_loop(model), model, plan, read_bytes=1, bytes_per_s=1)

    assert decode["of_matmuls"] > 0
    in_turn = ["step", "2 rows"] * 4  # the first of each warms up; what follows is the profile's
    assert happened[: len(in_turn)] == in_turn
    assert set(happened[len(in_turn) :]) == {"step"}


def test_both_decode_loops_give_the_same_tokens(model_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    prompts = [[1, 5, 9], [1, 7, 11]]
    answers = []
    for prepare in (transformers_loop, our_loop):
        decoder = prepare(model)(len(prompts), 8)
        answers.append([decoder.prefill(prompts), decoder.step(), decoder.step()])
    assert answers[0] == answers[1]


def test_server_of_a_thread_per_request_streams_all_tokens_and_counts_them(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    app = application(model, AutoTokenizer.from_pretrained(model_dir), concurrency=1)

    async def predict() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            body = {"prompt": "baba bebe", "max_new_tokens": 6}
            answer = await client.post("/v1/models/bench:predict", json=body)
            return answer.text

    events = [event for line in asyncio.run(predict()).encode().splitlines() if (event := read_event(line))]
    assert len("".join(event.text for event in events).split()) == 6
    assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (3, 6)
