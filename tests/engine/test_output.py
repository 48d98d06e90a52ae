"""Output: text events, the finish rule, and exactly one last event for each request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from model_server.engine.outputs.output import OutputWriter, finish_reason, finish_with_error
from model_server.errors import InternalError
from model_server.request import Finished, FinishReason, Request, SamplingParams, TextDelta
from tests.support.fakes import TokenIds

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
EOS = {2}


class StopsAtEnd(TokenIds):
    """A detokenizer that finds its stop string in the text that it held back until `flush`."""

    def flush(self) -> str:
        self.stopped = True
        return "rest"


def make_request(*detokenizers: TokenIds) -> Request:
    choices = list(detokenizers or (TokenIds(),))
    return Request([5, 6, 7], SamplingParams({}, 8, num_choices=len(choices)), choices)


def events(request: Request) -> list[Any]:
    """Return the events that the request's reader receives."""
    return asyncio.run(request.channel.receive())


@pytest.mark.parametrize(
    ("token_id", "num_tokens", "reason"),
    [(9, 7, None), (9, 8, LENGTH), (2, 1, STOP), (2, 8, STOP)],
    ids=["goes on", "last token allowed", "end of sequence", "end of sequence as the last token allowed"],
)
def test_the_finish_rule(token_id: int, num_tokens: int, reason: FinishReason | None) -> None:
    assert finish_reason(token_id, num_tokens, EOS, max_new_tokens=8) is reason


def test_a_token_adds_its_text_and_the_last_one_ends_the_choice() -> None:
    request = make_request()
    writer = OutputWriter(request)

    writer.write(9)
    writer.write(4, LENGTH)

    assert events(request) == [TextDelta("9 "), TextDelta("4 "), Finished(LENGTH, 3, 2)]
    assert (writer.finished, request.num_output_tokens) == (True, 2)


def test_tokens_after_the_end_are_discarded() -> None:
    request = make_request()
    writer = OutputWriter(request)
    writer.write(9, STOP)

    writer.write(4, LENGTH)
    writer.finish(LENGTH)

    assert events(request)[1:] == [Finished(STOP, 3, 1)]


def test_a_stop_string_in_the_held_back_text_makes_the_reason_stop() -> None:
    request = make_request(StopsAtEnd())

    OutputWriter(request).finish(LENGTH)

    assert events(request) == [TextDelta("rest"), Finished(STOP, 3, 0)]


def test_each_choice_ends_and_the_log_line_comes_with_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    request = make_request(TokenIds(), TokenIds())
    first, second = OutputWriter(request, 0), OutputWriter(request, 1)

    first.write(9, LENGTH)
    assert not caplog.records
    second.write(4, STOP)

    assert [e.index for e in events(request) if isinstance(e, Finished)] == [0, 1]
    assert [(r.outcome, r.batched) for r in caplog.records] == [("stop", False)]  # type: ignore[attr-defined]


def test_an_error_ends_all_choices_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    request = make_request(TokenIds(), TokenIds())
    writer = OutputWriter(request)

    finish_with_error(request, InternalError())
    finish_with_error(request, InternalError())
    writer.write(9, LENGTH)

    assert [type(event) for event in events(request)] == [InternalError]
    assert len(caplog.records) == 1


def test_a_cancelled_request_is_logged_as_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="model_server.telemetry.request_log")
    request = make_request()
    request.cancel()

    OutputWriter(request).finish(LENGTH)

    assert [r.outcome for r in caplog.records] == ["cancelled"]  # type: ignore[attr-defined]
