"""Prompt lookup: tokens per second with and without it, on text that repeats the prompt and on text that does not.

`python -m benchmarks.prompt_lookup` prints a table. A model of 100M random weights computes real steps, and its logits
are then replaced, so that the answer is a given text: a file of this repository with its names changed, a passage of
the prompt, or a page that has nothing to do with the prompt. Requests with and without prompt lookup take turns. The
speed-up is the ratio of the times between an answer's first and last token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from benchmarks import report
from benchmarks.checkpoint import SHAPES
from benchmarks.figures import Figure, ratios, spread
from benchmarks.runner import random_runner
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.engine import Engine
from model_server.request import Request, SamplingParams

Ranges = Sequence[TokenRange]
ROOT = Path(__file__).parent.parent
SHAPE = "100m"
LOOKUP = {"prompt_lookup_num_tokens": 10}
"""The default of the candidate generator of `generate`."""


NO_TEXT = SimpleNamespace(stopped=False, push=lambda token_id: "", flush=lambda: "")
"""A detokenizer whose text is empty."""


class ScriptedRunner(Runner):
    """Computes its steps, and has every token followed by the next one of the script."""

    script: Sequence[int] = ()

    @torch.inference_mode()
    def forward(self, decode: Ranges, prefill: Ranges, wanted: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        logits = super().forward(decode, prefill, wanted, tokens)
        positions = [position for part in (*decode, *prefill) for position in range(part.start, part.kv_len)]
        scripted = [self.script[min(positions[i] + 1, len(self.script) - 1)] for i in wanted]
        logits.zero_()[range(len(scripted)), scripted] = 1
        return logits


def texts() -> Iterator[tuple[str, str, str]]:
    """Yield names, prompts, and the answers that the model is made to give."""
    files = ("model_server/engine/sequence.py", "docs/monitoring.md", "docs/security.md")
    code, page, other = ((ROOT / name).read_text() for name in files)
    edited = code.replace("kv_offset", "cache_offset").replace("Sequence", "Job").replace("is_late", "is_overdue")
    paragraphs = [paragraph for paragraph in page.split("\n\n") if len(paragraph) > 200]
    quoted = "\n\nThe page also says:\n\n".join(reversed(paragraphs))
    yield "code edit", f"Rename three names.\n\n{code}\n\n", edited
    yield "quotes", f"{page}\n\nQuote what matters.\n\n", quoted
    yield "other text", f"{page}\n\nWrite of something else.\n\n", other


async def decode_s(engine: Engine, prompt: list[int], num_tokens: int, streams: int, fields: dict[str, Any]) -> float:
    """Return how long the answers take from the moment when all have a token."""
    sampling = SamplingParams({"do_sample": False, "eos_token_id": None, **fields}, num_tokens)
    no_text: Any = NO_TEXT
    requests = [Request(prompt, sampling, [no_text]) for _ in range(streams)]
    engine.submit(requests)

    async def read(request: Request) -> None:
        async for _ in request.answer():
            pass

    await asyncio.gather(*map(read, requests))
    assert all(request.num_output_tokens == num_tokens for request in requests)
    return max(r.last_token_s for r in requests) - max(r.first_token_s or 0.0 for r in requests)


async def measure(num_streams: Sequence[int], pairs: int, max_new_tokens: int) -> list[Figure]:
    tokenizer = ByteLevelBPETokenizer()  # of this repository's own text
    files = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "model_server").rglob("*.py")])
    contents = (path.read_text() for path in files)
    tokenizer.train_from_iterator(contents, vocab_size=SHAPES[SHAPE]["vocab_size"], show_progress=False)
    size = max(num_streams)
    runner = random_runner(ScriptedRunner, SHAPE, "bfloat16", "cpu", max_batch_size=size, max_len=4096)
    config = EngineConfig(
        max_batch_size=size, max_queue_size=size, max_fallback_tokens=0, max_prefill_tokens_per_step=128,
        max_prefill_tokens_when_idle=512, prefix_caching=True, stall_s=600,
    )  # fmt: skip
    no_tokenizer: Any = None
    engine = Engine(runner, no_tokenizer, config)
    engine.start()
    figures: list[Figure] = []
    for (name, prompt_text, answer_text), streams in itertools.product(texts(), num_streams):
        report.progress.print(f"{name}, {streams} streams")
        prompt, answer = tokenizer.encode(prompt_text).ids, tokenizer.encode(answer_text).ids[:max_new_tokens]
        runner.script = [*prompt, *answer]
        times_s = [
            [await decode_s(engine, prompt, len(answer), streams, fields) for fields in ({}, LOOKUP)]
            for _ in range(1 + pairs)
        ][1:]  # in the first pair, oneDNN compiles its matmuls
        without_s, with_s = zip(*times_s, strict=True)
        rate = spread(streams * (len(answer) - 1) / seconds for seconds in without_s)
        what = {"benchmark": "prompt lookup", "answer": name, "clients": streams, "prompt_tokens": len(prompt)}
        figures.append({**what, "without_tokens_per_s": rate, "speedup": ratios(without_s, with_s)})
    engine.stop()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=lambda value: [int(item) for item in value.split(",")], default=[1, 8])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    options = parser.parse_args()
    print(report.tables(asyncio.run(measure(options.streams, options.pairs, options.max_new_tokens))))
