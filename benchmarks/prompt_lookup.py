"""Prompt lookup: tokens per second with and without it, on text that repeats the prompt and on text that does not.

`python -m benchmarks.prompt_lookup` prints a table. A model of 100M random weights computes real steps, and its logits
are then replaced, so that the answer is a given text: a file of this repository with its names changed, a passage of
the prompt, or a page that has nothing to do with the prompt. Requests with and without prompt lookup take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from benchmarks import report
from benchmarks.checkpoint import SHAPES, random_mistral
from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.kv_cache.base import TokenRange
from model_server.compute.runner import Runner, make_kv_cache
from model_server.engine.config import EngineConfig
from model_server.engine.engine import Engine
from model_server.request import Request, SamplingParams
from model_server.telemetry.metrics import drafted_tokens_accepted_total, drafted_tokens_total

ROOT = Path(__file__).parent.parent
SHAPE = "100m"
NUM_TOKENS = 10
"""Guesses that a request asks for: the default of the candidate generator of `generate`."""


@dataclass(frozen=True)
class Text:
    """A prompt and the answer that the model is made to give."""

    name: str
    prompt: str
    answer: str


class NoText:
    """A detokenizer whose text is empty."""

    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class ScriptedRunner(Runner):
    """Computes its steps, and has every token followed by the next one of the script."""

    script: Sequence[int] = ()

    @torch.inference_mode()
    def forward(
        self,
        decode: Sequence[TokenRange],
        prefill: Sequence[TokenRange],
        wanted: Sequence[int],
        tokens: Tensor | None = None,
    ) -> Tensor:
        logits = super().forward(decode, prefill, wanted, tokens)
        positions = [position for part in (*decode, *prefill) for position in range(part.start, part.kv_len)]
        scripted = [self.script[min(positions[i] + 1, len(self.script) - 1)] for i in wanted]
        logits.zero_()[range(len(scripted)), scripted] = 1
        return logits


def texts() -> list[Text]:
    def read(name: str) -> str:
        return (ROOT / name).read_text()

    code, page, other = read("model_server/engine/sequence.py"), read("docs/monitoring.md"), read("docs/security.md")
    edited = code.replace("kv_offset", "cache_offset").replace("Sequence", "Job").replace("is_late", "is_overdue")
    paragraphs = [paragraph for paragraph in page.split("\n\n") if len(paragraph) > 200]
    quoted = "\n\nThe page also says:\n\n".join(reversed(paragraphs))
    return [
        Text("code edit", f"Rename three names.\n\n{code}\n\n", edited),
        Text("quotes", f"{page}\n\nQuote what matters.\n\n", quoted),
        Text("other text", f"{page}\n\nWrite of something else.\n\n", other),
    ]


def word_pieces() -> Tokenizer:
    """Return a BPE tokenizer of this repository's own text."""
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "model_server").rglob("*.py")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPES[SHAPE]["vocab_size"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((re.sub(r"\n+", "\n", path.read_text()) for path in sorted(files)), trainer)
    return tokenizer


def scripted_engine(max_batch_size: int, max_len: int, dtype: torch.dtype) -> tuple[Engine, ScriptedRunner]:
    torch.set_grad_enabled(False)
    model: Any = random_mistral(SHAPE, dtype)
    fuse(model)
    pack(model)
    cache = make_kv_cache(
        model.config, model.dtype, model.device, max_batch_size=max_batch_size, num_tokens=max_batch_size * max_len,
        max_sequence_tokens=max_len, flash=False,
    )  # fmt: skip
    runner = ScriptedRunner(model, cache)
    config = EngineConfig(
        max_batch_size=max_batch_size, max_queue_size=100, max_fallback_tokens=0, max_prefill_tokens_per_step=128,
        max_prefill_tokens_when_idle=512, prefix_caching=False, stall_s=600,
    )  # fmt: skip
    tokenizer: Any = None
    return Engine(runner, tokenizer, config), runner


async def decode_s(engine: Engine, prompt: list[int], num_tokens: int, streams: int, fields: dict[str, Any]) -> float:
    """Return how long the answers take from the moment when all have a token."""
    sampling = SamplingParams({"do_sample": False, "eos_token_id": None, **fields}, num_tokens)
    requests = [Request(prompt, sampling, [NoText()]) for _ in range(streams)]
    engine.submit(requests)

    async def read(request: Request) -> None:
        async for _ in request.answer():
            pass

    await asyncio.gather(*map(read, requests))
    assert all(request.num_output_tokens == num_tokens for request in requests)
    return max(r.last_token_s for r in requests) - max(r.first_token_s or 0.0 for r in requests)


async def measure(options: argparse.Namespace) -> None:
    tokenizer = word_pieces()
    lookup = {"prompt_lookup_num_tokens": options.num_tokens}
    engine, runner = scripted_engine(max(options.streams), 4096, getattr(torch, options.dtype))
    engine.start()
    rows = []
    for text in texts():
        prompt, answer = (tokenizer.encode(part).ids for part in (text.prompt, text.answer))
        answer = answer[: options.max_new_tokens]
        runner.script = [*prompt, *answer]
        for streams in options.streams:
            for fields in ({}, lookup):  # oneDNN compiles its matmuls
                await decode_s(engine, prompt, len(answer), streams, fields)
            counts = drafted_tokens_total._value.get(), drafted_tokens_accepted_total._value.get()
            pairs = [
                [await decode_s(engine, prompt, len(answer), streams, f) for f in ({}, lookup)]
                for _ in range(options.pairs)
            ]
            ratio = statistics.median(plain_s / with_lookup_s for plain_s, with_lookup_s in pairs)
            rate = statistics.median(streams * (len(answer) - 1) / plain_s for plain_s, _ in pairs)
            drafted = (drafted_tokens_total._value.get() - counts[0]) / options.pairs / streams
            accepted = (drafted_tokens_accepted_total._value.get() - counts[1]) / options.pairs / streams
            report.progress.print(f"{text.name}, {streams} streams: {ratio:.2f}")
            rows.append(
                [text.name, str(streams), str(len(prompt)), str(len(answer)), f"{drafted:.0f}", f"{accepted:.0f}",
                 f"{rate:.0f}", f"{ratio:.2f}"]
            )  # fmt: skip
    engine.stop()
    names = ["answer", "streams", "prompt tokens", "tokens", "guessed", "right", "tokens/s without", "ratio"]
    report.table(f"Prompt lookup of {options.num_tokens} tokens, {options.dtype}", names, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=lambda value: [int(item) for item in value.split(",")], default=[1, 8])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--num-tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--dtype", default="bfloat16")
    asyncio.run(measure(parser.parse_args()))
