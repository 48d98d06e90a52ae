"""What a model served by hand usually is: a thread in `model.generate` and a streamer for each request.

Stands for a Truss whose `predict` streams: as many requests at a time as its `predict_concurrency` (1 unless
configured), each held until its generation ends. KServe's huggingfaceserver with its Transformers backend is
built the same way, one request at a time; it is not on PyPI and not what is measured here. The wire is our V1
stream, so that the comparison is of generation alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from threading import Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


def application(model: Any, tokenizer: Any, concurrency: int) -> Starlette:
    """Return the server; `concurrency` 0 lets every request generate at once."""
    turn = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()

    async def predict(request: Request) -> Response:
        body = await request.json()
        return StreamingResponse(stream(body["prompt"], body["max_new_tokens"]), media_type="text/event-stream")

    async def stream(prompt: str, max_new_tokens: int) -> AsyncIterator[str]:
        inputs = tokenizer(prompt, return_tensors="pt")
        sequences = []
        async with turn:
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

            def generate() -> None:
                sequences.append(
                    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
                )

            thread = Thread(target=generate, daemon=True)
            thread.start()
            async for text in iterate_in_threadpool(streamer):
                if text:
                    yield _frame({"text": text})
            thread.join()
        prompt_tokens = inputs.input_ids.shape[1]
        yield _frame(
            {
                "text": "",
                "finish_reason": "length",
                "prompt_tokens": prompt_tokens,
                "completion_tokens": sequences[0].shape[1] - prompt_tokens,
            }
        )

    async def ready(request: Request) -> Response:
        return PlainTextResponse("ready")

    return Starlette(routes=[Route("/v1/models/bench:predict", predict, methods=["POST"]), Route("/ready", ready)])


def _frame(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("port", type=int)
    parser.add_argument("--concurrency", type=int, default=1)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir)
    uvicorn.run(
        application(model, tokenizer, options.concurrency),
        host="127.0.0.1",
        port=options.port,
        access_log=False,
    )


if __name__ == "__main__":
    main()
