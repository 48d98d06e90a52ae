"""The V1 wire format: every body in, every event out, with a byte tokenizer and a scripted engine."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from model_server.api.prompts import ModelLimits, ServedModel
from model_server.api.v1 import predict, predictions
from model_server.errors import BadRequest, OutOfMemory, QueueFull, ServeError
from model_server.request import Finished, FinishReason, TextDelta
from tests.support.fakes import VOCAB_SIZE, ByteText, play
from tests.support.malformed import MALFORMED, Malformed

API_DOC = Path(__file__).parents[2] / "docs" / "api.md"
MODEL = ServedModel("tiny", ByteText(), ModelLimits(max_model_len=4096, vocab_size=VOCAB_SIZE, eos_token_ids=(2,)))
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def parsed(**body: object) -> predict.PredictCall:
    return predict.parse(body, MODEL, "request-1", deadline_s=60.0)


async def collect(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_malformed_body_is_refused_at_once_with_a_sentence_that_names_the_field(case: Malformed):
    start_s = time.process_time()  # CPU time: a busy machine changes nothing
    with pytest.raises(BadRequest) as refused:
        predict.parse(predict.parse_json(case.body), MODEL)
    assert case.word in str(refused.value)
    assert len(str(refused.value)) < 400
    assert time.process_time() - start_s < 1
    json.dumps(refused.value.body()).encode()


def test_lone_surrogate_from_a_lenient_decoder_is_refused():
    with pytest.raises(BadRequest, match="prompt must be valid Unicode"):
        parsed(prompt="a\ud800")


def test_prompt_becomes_one_request_with_the_documented_defaults():
    [request] = parsed(prompt="Hi").requests
    assert request.num_prompt_tokens == 3
    assert request.sampling.max_new_tokens == 512
    assert request.sampling.generate == {"temperature": 0.1, "top_p": 0.75, "top_k": 40, "do_sample": True}
    assert (request.request_id, request.deadline_s) == ("request-1", 60.0)


def test_messages_go_through_the_chat_template_and_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    call = parsed(messages=[{"role": "user", "content": parts}], return_full_text=True)
    assert call.prompts == ("<user>Hello",)


def test_instance_overrides_parameters_which_override_defaults():
    call = parsed(
        instances=["a", {"prompt": "b", "max_new_tokens": 7}, {"prompt": "c", "top_k": None}],
        parameters={"max_tokens": 5, "top_k": 9},
    )
    assert [request.sampling.max_new_tokens for request in call.requests] == [5, 7, 5]
    assert [request.sampling.generate["top_k"] for request in call.requests] == [9, 9, 9]


def test_requests_of_one_call_share_a_group_and_of_two_calls_do_not():
    call, other = parsed(instances=["a", "b"]), parsed(prompt="c")
    groups = {request.group for request in call.requests}
    assert len(groups) == 1
    assert other.requests[0].group not in groups


def test_sampled_sequences_become_requests_with_seeds_that_count_up():
    call = parsed(prompt="a", num_return_sequences=3, seed=10)
    assert [request.sampling.seed for request in call.requests] == [10, 11, 12]
    assert all(len(request.detokenizers) == 1 for request in call.requests)


def test_beams_become_one_request_with_several_answers():
    [request] = parsed(prompt="a", num_beams=4, num_return_sequences=3).requests
    assert (request.sampling.num_choices, len(request.detokenizers)) == (3, 3)


def test_nul_and_emoji_are_ordinary_text():
    assert parsed(prompt="a\0😀").requests[0].num_prompt_tokens == 7


def test_prompt_that_just_fits_generates_one_token_and_one_longer_is_refused():
    assert parsed(prompt="a" * 4094).requests[0].sampling.max_new_tokens == 1
    with pytest.raises(BadRequest, match=r"instances\[0\].prompt is 4096 tokens; the maximum context length is 4096"):
        parsed(instances=["a" * 4095])


def test_too_many_characters_are_refused_before_the_tokenizer_sees_them():
    class NoTokenizer(ByteText):
        def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
            raise AssertionError("tokenized")

    with pytest.raises(BadRequest, match="prompt has 16385 characters"):
        predict.parse({"prompt": "a" * 16385}, ServedModel("tiny", NoTokenizer(), MODEL.limits))


def test_answer_has_a_prediction_for_each_instance_in_order_whoever_ends_first():
    async def scenario() -> dict:
        call = parsed(instances=["a", {"prompt": "b", "return_full_text": True}])
        play(call.requests[1], "2", LENGTH)
        play(call.requests[0], "1", "1", STOP)
        return await predictions.answer(call)

    first, second = asyncio.run(scenario())["predictions"]
    assert first == {
        "generated_text": "11",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "completion_tokens": 2,
    }
    assert (second["generated_text"], second["finish_reason"]) == ("b2", "length")


def test_answers_of_one_request_are_told_apart_by_index():
    async def scenario() -> dict:
        call = parsed(prompt="p", num_beams=2, num_return_sequences=2)
        for index in (1, 0):
            call.requests[0].channel.send(TextDelta(f"beam {index}", index))
            call.requests[0].channel.send(Finished(STOP, 2, 1, index))
        return await predictions.answer(call)

    texts = [prediction["generated_text"] for prediction in asyncio.run(scenario())["predictions"]]
    assert texts == ["beam 0", "beam 1"]


def test_one_failed_request_fails_the_call_and_cancels_the_others():
    async def scenario() -> predict.PredictCall:
        call = parsed(instances=["a", "b", "c"])
        play(call.requests[1], "half", OutOfMemory("No memory."))
        with pytest.raises(OutOfMemory):
            await predictions.answer(call)
        return call

    assert all(request.cancelled for request in asyncio.run(scenario()).requests)


def test_leaving_an_answer_cancels_requests_that_were_never_read():
    async def scenario() -> predict.PredictCall:
        call = parsed(instances=["a", "b"])
        task = asyncio.create_task(predictions.answer(call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return call

    assert all(request.cancelled for request in asyncio.run(scenario()).requests)


def test_stream_is_text_events_then_the_counts_then_done():
    async def scenario() -> bytes:
        call = parsed(prompt="a", stream=True)
        play(call.requests[0], "né", "\n😀", STOP)
        return await collect(await predictions.sse(call))

    assert asyncio.run(scenario()).decode() == (
        'data: {"text":"né"}\n\n'
        'data: {"text":"\\n😀"}\n\n'
        'data: {"text":"","finish_reason":"stop","prompt_tokens":2,"completion_tokens":2}\n\n'
        "data: [DONE]\n\n"
    )


def test_stream_begins_with_the_prompt_when_the_full_text_is_wanted():
    async def scenario() -> bytes:
        call = parsed(prompt="Once", stream=True, return_full_text=True)
        play(call.requests[0], " upon", STOP)
        return await collect(await predictions.sse(call))

    assert asyncio.run(scenario()).startswith(b'data: {"text":"Once"}\n\ndata: {"text":" upon"}\n\n')


@pytest.mark.parametrize("start", [predictions.sse, predictions.plain_text])
def test_failure_before_the_first_event_is_raised_before_anything_is_sent(start):
    async def scenario() -> None:
        call = parsed(prompt="a", stream=True)
        play(call.requests[0], QueueFull("128 requests wait already.", retry_after_s=1))
        await start(call)

    with pytest.raises(QueueFull):
        asyncio.run(scenario())


def test_failure_after_the_first_event_is_raised_by_the_stream():
    async def scenario() -> None:
        call = parsed(prompt="a", stream=True)
        play(call.requests[0], "half", OutOfMemory("No memory."))
        await collect(await predictions.sse(call))

    with pytest.raises(OutOfMemory):
        asyncio.run(scenario())


def test_plain_text_is_the_bare_text():
    async def scenario() -> bytes:
        call = parsed(prompt="a", stream=True)
        play(call.requests[0], "né", "", "😀", STOP)
        return await collect(await predictions.plain_text(call))

    assert asyncio.run(scenario()).decode() == "né😀"


def test_plain_text_that_fails_half_way_raises_so_that_the_connection_is_cut():
    async def scenario() -> list[bytes]:
        call = parsed(prompt="a", stream=True)
        play(call.requests[0], "half", OutOfMemory("No memory."))
        pieces = await predictions.plain_text(call)
        received = [await anext(pieces)]
        with pytest.raises(OutOfMemory):
            await anext(pieces)
        return received

    assert asyncio.run(scenario()) == [b"half"]


@pytest.mark.parametrize("start", [predictions.sse, predictions.plain_text])
def test_leaving_a_stream_half_way_cancels_its_request(start):
    async def scenario() -> bool:
        call = parsed(prompt="a", stream=True)
        play(call.requests[0], "half")
        pieces = await start(call)
        await anext(pieces)
        await pieces.aclose()
        return call.requests[0].cancelled

    assert asyncio.run(scenario())


def test_leaving_while_waiting_for_the_first_event_cancels_the_request():
    async def scenario() -> bool:
        call = parsed(prompt="a", stream=True)
        waiting = asyncio.create_task(predictions.sse(call))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return call.requests[0].cancelled

    assert asyncio.run(scenario())


def errors_under(kind: type[ServeError]) -> list[type[ServeError]]:
    return [error for child in kind.__subclasses__() for error in [child, *errors_under(child)]]


@pytest.mark.parametrize("error", errors_under(ServeError))
def test_every_error_is_documented_with_its_status(error: type[ServeError]):
    assert f"| {error.status} | `{error.code}` |" in API_DOC.read_text()


def test_documented_bodies_are_accepted():
    bodies = re.findall(r'```json\n(\{"(?:prompt|messages|instances)".*)\n', API_DOC.read_text())
    assert len(bodies) == 3
    for body in bodies:
        assert predict.parse(predict.parse_json(body.encode()), MODEL).requests


@pytest.mark.parametrize(
    "body",
    [
        {"instances": "secret words"},
        {"prompt": "Hello", "top_k": "secret words"},
        {"prompt": "Hello", "stop": {"a": "secret words"}},
    ],
    ids=str,
)
def test_refusal_does_not_repeat_the_text_it_was_sent(body: dict):
    with pytest.raises(BadRequest) as refused:
        parsed(**body)
    assert "secret" not in str(refused.value)
