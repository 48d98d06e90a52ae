"""This server's engine and text without HTTP, in the process that asks: what the server around it costs.

`python -m benchmarks.engine_alone` prints one JSON object at the end; `serve` starts it and reads that.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.figures import Figure, summary
from benchmarks.load import Answer, closed_loop, least_disturbed
from benchmarks.prompts import prompts_for
from benchmarks.streams import incomplete


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    for name, kind in (("prompt_tokens", int), ("max_new_tokens", int), ("min_seconds", float), ("limit_s", float)):
        parser.add_argument(name, type=kind)
    parser.add_argument("clients", type=int)
    options = parser.parse_args()
    del sys.argv[1:]  # KServe reads the command line when it is imported

    import kserve.model_server

    from model_server.model import MistralModel
    from model_server.predict import parse
    from model_server.request import Chunk, Final
    from model_server.settings import Settings

    argv = ["--model_dir", str(options.model_dir), "--model_name", "bench"]
    model = MistralModel(Settings.parse(argv, {}, kserve.model_server.parser))
    model.load()
    engine = model.generation
    assert engine is not None

    async def ask(prompt: str, answer: Answer) -> None:
        body = {"prompt": prompt, "max_new_tokens": options.max_new_tokens, "temperature": 0}
        call = await asyncio.to_thread(parse, body, model.text, model.limits)
        engine.submit(list(call.requests))
        async for event in call.requests[0].answer():
            if isinstance(event, Chunk):
                answer.chunk_times_s.append(time.perf_counter())
                answer.text += event.text
            elif isinstance(event, Final):
                answer.prompt_tokens, answer.completion_tokens = event.prompt_tokens, event.completion_tokens
        answer.ended_s = time.perf_counter()
        answer.error = incomplete(answer, options.max_new_tokens)

    async def measure() -> tuple[Figure, str]:
        prompts = itertools.cycle(prompts_for(options.model_dir, options.prompt_tokens, count=1024))
        warm_up = await closed_loop(ask, prompts, clients=1, min_seconds=0, limit_s=options.limit_s)
        load = functools.partial(closed_loop, ask, prompts, clients=options.clients, limit_s=options.limit_s)
        await load(min_seconds=0)
        run = await least_disturbed(lambda: load(min_seconds=options.min_seconds))
        return summary(run), warm_up.answers[0].text

    figure, text = uvloop.run(measure())
    print(json.dumps({"figure": figure, "text": text}), flush=True)
    os._exit(0)  # the engine may be in a step for requests that were cut; Python must not end under its thread


if __name__ == "__main__":
    main()
