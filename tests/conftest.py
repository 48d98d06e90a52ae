"""Fixtures that several modules share: a small model of the real architecture, and engines around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM
from transformers.utils import logging as transformers_logging

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.compute.gpu.cuda_graphs import DecodeGraphs
from model_server.compute.kv_cache import contiguous
from model_server.compute.kv_cache.dense import DenseKVCache
from model_server.compute.runner import Runner
from model_server.engine.config import EngineConfig
from model_server.engine.engine import Engine
from model_server.text.tokenizer import Text
from tests.support.contiguous_cache import contiguous_cache
from tests.support.fake_gpu import FakeGPU, fake_gpu
from tests.support.flash_attention import documented_varlen_attn
from tests.support.server_process import ServerProcess
from tests.support.small_tokenizers import byte_fallback, with_tools
from tests.support.tiny_model import tiny_mistral

# A model of three small layers runs fastest on one thread, all the more beside other work.
torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that can be run or left out as a group."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if folder in ("chart", "load"):
        item.add_marker(folder)
    if "browser" in getattr(item, "fixturenames", ()):
        item.add_marker("browser")


@pytest.fixture(autouse=True)
def none_of_your_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client reads from the environment is not there, whoever runs the tests."""
    for name in ("MISTRAL_URL", "MISTRAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """Its advice on generation flags is for people at a prompt."""
    transformers_logging.set_verbosity_error()


@pytest.fixture(scope="session")
def plain_model() -> MistralForCausalLM:
    """A tiny Mistral as Transformers makes it: the oracle."""
    return tiny_mistral()


@pytest.fixture(scope="session")
def model() -> MistralForCausalLM:
    """The same as the server holds it: fused and packed."""
    model = tiny_mistral()
    fuse(model)
    pack(model)
    return model


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """A GPU that checks every operation and computes nothing (`tests/support/fake_gpu.py`)."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built without CUDA, so it has no fake CUDA tensors")
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


@pytest.fixture
def make_engine(model: MistralForCausalLM) -> Iterator[Callable[..., Engine]]:
    """A factory of started engines, stopped when the test ends."""
    engines = []

    def make(
        model: MistralForCausalLM = model,
        *,
        max_model_len: int = 256,
        max_batch_size: int = 6,
        runner: Runner | None = None,
        overlap: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_death: Callable[[str], None] = lambda reason: None,
        **changes: object,
    ) -> Engine:
        if runner is None:
            kv_cache = DenseKVCache(
                model.config,
                max_batch_size=max_batch_size,
                max_sequence_tokens=max_model_len,
                dtype=model.dtype,
                device=model.device,
            )
            runner = Runner(model, kv_cache)
        if overlap:
            runner.is_async = True  # as on a GPU: the engine takes its overlapped loop
        settings: dict[str, Any] = {
            "max_queue_size": 100,
            "max_fallback_tokens": 5000,
            "max_prefill_tokens_per_step": 32,
            "max_prefill_tokens_when_idle": 64,
            "prefix_caching": True,
            "stall_s": 60.0,
        }
        config = EngineConfig(max_batch_size=max_batch_size, **(settings | changes))
        tokenizer: Any = None
        engine = Engine(runner, tokenizer, config, clock=clock, on_death=on_death)
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()
    for engine in engines:  # Python must not end under a thread that computes: the process would abort
        engine.join(30)


@pytest.fixture(params=["plain", "flash", "graphs"])
def make_contiguous_engine(
    request: pytest.FixtureRequest, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    """A factory of engines with a contiguous KV cache: plain attention, flash attention, and static decode steps."""
    monkeypatch.setattr(contiguous, "varlen_attn", documented_varlen_attn)

    def make(model: MistralForCausalLM, **changes: Any) -> Engine:
        cache = contiguous_cache(model, flash=request.param != "plain")
        runner = Runner(model, cache)
        if request.param == "graphs":
            runner.graphs = DecodeGraphs(runner.decoder, cache, changes.get("max_batch_size", 6))
        return make_engine(model, runner=runner, overlap=True, **changes)

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral in Hugging Face files, tokenizer and chat template included."""
    return saved_model(tmp_path_factory.mktemp("model"), byte_fallback())


@pytest.fixture(scope="session")
def tool_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the control tokens and the chat template of a model that calls tools."""
    return saved_model(tmp_path_factory.mktemp("tool-model"), with_tools())


def saved_model(directory: Path, text: Text) -> Path:
    tiny_mistral(vocab_size=len(text.tokenizer), max_position_embeddings=8192).save_pretrained(directory)
    text.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def start_server(model_dir: Path) -> Iterator[Callable[..., ServerProcess]]:
    """A factory of servers on the tiny model; all are stopped at the end."""
    started = []

    def start(
        *flags: str, environ: dict[str, str] | None = None, ready: bool = True, model_dir: Path = model_dir
    ) -> ServerProcess:
        server = ServerProcess(model_dir, *flags, environ=environ)
        started.append(server)
        if ready:
            server.wait_until_ready()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """One server that many tests share; they must leave it as they found it."""
    return start_server()


@pytest.fixture(scope="session")
def tool_server(start_server: Callable[..., ServerProcess], tool_model_dir: Path) -> ServerProcess:
    """One server that many tests share, on a model that calls tools."""
    return start_server(model_dir=tool_model_dir)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the server does."""
    return "asyncio"
