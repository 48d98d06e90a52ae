"""Completions through OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch
from transformers import MistralForCausalLM

from model_server.engine.scheduling.prefix_cache import common_prefix_length
from tests.support.openai_api import MESSAGES, NAME, TEXT, Ask


def test_the_models_are_listed(ask: Ask) -> None:
    assert [model.id for model in ask(lambda client: client.models.list()).data] == [NAME]


def test_a_completion_is_what_the_model_generates(ask: Ask, mistral: MistralForCausalLM) -> None:
    got = ask(lambda client: client.completions.create(model=NAME, prompt="The meaning", temperature=0, max_tokens=8))
    ids = TEXT.encode("The meaning")
    expected = mistral.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert got.choices[0].text == TEXT.decode(expected)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), len(expected))
    assert got.object == "text_completion"


def test_usage_says_what_of_the_prompts_was_cached_each_counted_once(ask: Ask) -> None:
    prompts = ["a beginning that both have, one", "a beginning that both have, two"]
    common = common_prefix_length(*map(TEXT.encode, prompts))

    async def one_after_the_other(client: openai.AsyncOpenAI) -> list[Any]:
        usages = [
            (await client.completions.create(model=NAME, prompt=prompt, n=3, max_tokens=2)).usage for prompt in prompts
        ]
        stream = await client.completions.create(
            model=NAME, prompt=prompts, n=2, max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
        return [*usages, [chunk async for chunk in stream][-1].usage]

    usages = ask(one_after_the_other)
    lengths = [len(TEXT.encode(prompt)) for prompt in prompts]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert [usage.prompt_tokens for usage in usages] == [*lengths, sum(lengths)]
    assert cached[:2] == [0, common]
    assert common + lengths[1] - 1 <= cached[2] <= sum(lengths) - 2


def test_sixteen_tokens_are_the_default_of_a_completion_and_the_window_that_of_a_chat(ask: Ask) -> None:
    bias = {"2": -100}  # never the end of the text
    completion = ask(lambda client: client.completions.create(model=NAME, prompt="a", logit_bias=bias))
    chat = ask(lambda client: client.chat.completions.create(model=NAME, messages=MESSAGES, logit_bias=bias))
    assert completion.usage.completion_tokens == 16
    assert chat.usage.total_tokens == 64
    assert (completion.choices[0].finish_reason, chat.choices[0].finish_reason) == ("length", "length")


@pytest.mark.parametrize("as_tokens", [True, False])
def test_echoed_logprobs_are_the_models_own(ask: Ask, mistral: MistralForCausalLM, as_tokens: bool) -> None:
    """What evaluation harnesses ask: prompt and one token, each with its log-probability and the likeliest."""
    ids = TEXT.encode("things better than you found")
    got = ask(
        lambda client: client.completions.create(
            model=NAME, prompt=ids if as_tokens else "things better than you found", echo=True, logprobs=2,
            max_tokens=1, temperature=0,
        )
    )  # fmt: skip
    logprobs = got.choices[0].logprobs
    expected = mistral(torch.tensor([ids])).logits[0].log_softmax(-1)
    of_prompt = [expected[i, token].item() for i, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(of_prompt, abs=1e-4)
    assert logprobs.token_logprobs[-1] == pytest.approx(expected[-1].max().item(), abs=1e-4)
    assert max(logprobs.top_logprobs[-1].values()) == logprobs.token_logprobs[-1]
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(ids) + 1
    assert got.choices[0].text.lstrip().startswith("things better than you found")


def test_an_echo_without_new_tokens_is_the_prompt_alone(ask: Ask) -> None:
    got = ask(lambda client: client.completions.create(model=NAME, prompt="abc", echo=True, logprobs=0, max_tokens=0))
    assert got.choices[0].text == "abc"
    assert len(got.choices[0].logprobs.tokens) == got.usage.prompt_tokens
    assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (0, "length")


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_joined_is_the_whole_answer(ask: Ask, echo: bool, logprobs: int | None) -> None:
    asked = {"model": NAME, "prompt": ["hello", "naïve"], "n": 2, "seed": 1, "echo": echo, "logprobs": logprobs}

    async def both(client: openai.AsyncOpenAI) -> Any:
        whole = await client.completions.create(**asked)
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        return whole, chunks

    whole, chunks = ask(both)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        if logprobs is not None:
            pairs = [pair for part in parts for pair in tokens_and_offsets(part.logprobs)]
            assert pairs == tokens_and_offsets(choice.logprobs)


def tokens_and_offsets(logprobs: Any) -> list[tuple[str, int]]:
    return list(zip(logprobs.tokens, logprobs.text_offset, strict=True))


def test_the_same_seed_gives_the_same_choices_and_different_ones_to_each(ask: Ask) -> None:
    def texts() -> list[str]:
        got = ask(lambda client: client.completions.create(model=NAME, prompt="hello", n=3, seed=-5, temperature=2))
        return [choice.text for choice in got.choices]

    assert texts() == texts()
    assert len(set(texts())) == 3


def test_logit_bias_can_force_a_token_and_a_stop_string_end_the_text(ask: Ask) -> None:
    letter = TEXT.tokenizer.convert_tokens_to_ids("b")
    forced = ask(
        lambda client: client.completions.create(model=NAME, prompt="a", logit_bias={str(letter): 100}, max_tokens=4)
    )
    stopped = ask(
        lambda client: client.completions.create(model=NAME, prompt="a", logit_bias={str(letter): 100}, stop="bb")
    )
    assert forced.choices[0].text == "bbbb"
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")


def test_a_refusal_is_the_clients_own_exception(ask: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(lambda client: client.completions.create(model=NAME, prompt="a", temperature=3))
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(lambda client: client.chat.completions.create(model="gpt-4", messages=MESSAGES))
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="chat template refuses"):
        ask(
            lambda client: client.chat.completions.create(
                model=NAME, messages=[{"role": "developer", "content": "Be brief."}]
            )
        )
