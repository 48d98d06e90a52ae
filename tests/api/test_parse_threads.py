"""The threads that parse bodies: a slow compilation of a grammar delays no body without a new grammar."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from model_server.api.parse_threads import MAX_COMPILATIONS, ParseThreads
from model_server.errors import BadRequest, QueueFull
from model_server.model import MistralModel
from model_server.settings import Settings
from model_server.text import grammar
from model_server.text.grammar import GrammarCompiler, GrammarKind, GrammarSpec
from tests.support.small_tokenizers import byte_fallback

TEXT = byte_fallback()
MORE_THAN_ASYNCIO_HAS_THREADS = 40
WAIT_S = 30


class SlowCompiler:
    """A compiler whose compilations wait until `go_on` is set, as a hostile grammar makes them wait for a core."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer_json = TEXT.tokenizer.backend_tokenizer.to_str
        self._compiler = GrammarCompiler(tokenizer_json, vocab_size=len(TEXT.tokenizer), eos_token_ids=[2])
        self._source = grammar._source
        self.go_on = threading.Event()
        self.began: list[str] = []
        monkeypatch.setattr(grammar, "_source", self._wait)

    def _wait(self, spec: GrammarSpec) -> str:
        self.began.append(spec.source)
        assert self.go_on.wait(WAIT_S)
        return self._source(spec)

    def parse(self, regex: str) -> str:
        """Compile the grammar of a body, and return the name of the thread."""
        self._compiler.compile(GrammarSpec(GrammarKind.REGEX, regex))
        return threading.current_thread().name

    async def until_began(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.began) < count:
                await asyncio.sleep(0.01)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCompiler]:
    compiler = SlowCompiler(monkeypatch)
    yield compiler
    compiler.go_on.set()


async def test_a_body_without_a_grammar_does_not_wait_for_compilations(compiler: SlowCompiler) -> None:
    threads = ParseThreads(max_waiting=MORE_THAN_ASYNCIO_HAS_THREADS)
    slow = [
        asyncio.create_task(threads.run(lambda i=i: compiler.parse(f"{i}")))
        for i in range(MORE_THAN_ASYNCIO_HAS_THREADS)
    ]
    await compiler.until_began(MAX_COMPILATIONS)

    assert await asyncio.wait_for(threads.run(lambda: "parsed"), WAIT_S) == "parsed"

    assert len(compiler.began) == MAX_COMPILATIONS
    compiler.go_on.set()
    assert {name.rsplit("_", 1)[0] for name in await asyncio.gather(*slow)} == {"compile-grammar"}


async def test_a_body_with_a_compiled_grammar_does_not_wait_for_compilations(compiler: SlowCompiler) -> None:
    threads = ParseThreads(max_waiting=8)
    compiler.go_on.set()
    await threads.run(lambda: compiler.parse("known"))
    compiler.go_on.clear()
    slow = [asyncio.create_task(threads.run(lambda i=i: compiler.parse(f"{i}"))) for i in range(8)]
    await compiler.until_began(1 + MAX_COMPILATIONS)

    thread = await asyncio.wait_for(threads.run(lambda: compiler.parse("known")), WAIT_S)

    assert not thread.startswith("compile-grammar")
    compiler.go_on.set()
    await asyncio.gather(*slow)


async def test_a_refused_grammar_is_compiled_once(compiler: SlowCompiler) -> None:
    threads = ParseThreads(max_waiting=8)
    compiler.go_on.set()

    for _ in range(2):
        with pytest.raises(BadRequest, match="regex: "):
            await threads.run(lambda: compiler.parse("(no end"))

    assert len(compiler.began) == 1


async def test_a_disconnected_client_leaves_the_queue_of_compilations(compiler: SlowCompiler) -> None:
    threads = ParseThreads(max_waiting=8)
    slow = [asyncio.create_task(threads.run(lambda i=i: compiler.parse(f"{i}"))) for i in range(MAX_COMPILATIONS)]
    await compiler.until_began(MAX_COMPILATIONS)
    left, after = (asyncio.create_task(threads.run(lambda name=name: compiler.parse(name))) for name in "ab")
    async with asyncio.timeout(WAIT_S):
        while threads._num_compiling < MAX_COMPILATIONS + 2:
            await asyncio.sleep(0.01)

    left.cancel()
    await asyncio.wait([left])
    compiler.go_on.set()
    await asyncio.gather(*slow, after)

    assert compiler.began[MAX_COMPILATIONS:] == ["b"]


async def test_the_queue_of_compilations_is_limited(compiler: SlowCompiler) -> None:
    threads = ParseThreads(max_waiting=1)
    slow = [asyncio.create_task(threads.run(lambda i=i: compiler.parse(f"{i}"))) for i in range(MAX_COMPILATIONS + 1)]
    async with asyncio.timeout(WAIT_S):
        while threads._num_compiling < MAX_COMPILATIONS + 1:
            await asyncio.sleep(0.01)

    with pytest.raises(QueueFull, match="1 requests are waiting for the compilation"):
        await threads.run(lambda: compiler.parse("one too many"))

    compiler.go_on.set()
    await asyncio.gather(*slow)


async def test_the_model_compiles_in_these_threads(compiler: SlowCompiler) -> None:
    names: list[str] = []
    engine: Any = SimpleNamespace(ensure_accepting=lambda: None, submit=lambda requests: None)
    model = MistralModel(Settings())
    model.llm_engine = engine
    compiler.go_on.set()

    def parse(deadline_s: float) -> Any:
        names.append(compiler.parse("new"))
        return SimpleNamespace(requests=())

    await model.submit(parse)

    assert [name.rsplit("_", 1)[0] for name in names] == ["compile-grammar"]
