"""A server with a thread in `model.generate` and a `TextIteratorStreamer` for each request.

It stands for a Truss whose `predict` streams: `--concurrency` requests at a time (Truss's `predict_concurrency`, 1
unless configured; 0 is no limit). The stream is V1's, so that the comparison is of generation alone.
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
    limit = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()

    async def stream(prompt: str, max_new_tokens: int) -> AsyncIterator[str]:
        inputs = tokenizer(prompt, return_tensors="pt")
        outputs = []
        async with limit:
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
            thread = Thread(target=lambda: outputs.append(model.generate(**inputs, **options)), daemon=True)
            thread.start()
            async for text in iterate_in_threadpool(streamer):
                if text:
                    yield _event({"text": text})
            thread.join()
        prompt_tokens = inputs.input_ids.shape[1]
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": outputs[0].shape[1] - prompt_tokens}
        yield _event({"text": "", "finish_reason": "length", **usage})

    async def predict(request: Request) -> Response:
        body = await request.json()
        return StreamingResponse(stream(body["prompt"], body["max_new_tokens"]), media_type="text/event-stream")

    async def ready(request: Request) -> Response:
        return PlainTextResponse("ready")

    return Starlette(routes=[Route("/v1/models/bench:predict", predict, methods=["POST"]), Route("/ready", ready)])


def _event(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("port", type=int)
    parser.add_argument("--concurrency", type=int, default=1)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model_dir, dtype="auto")
    app = application(model, AutoTokenizer.from_pretrained(options.model_dir), options.concurrency)
    uvicorn.run(app, host="127.0.0.1", port=options.port, access_log=False)


if __name__ == "__main__":
    main()
