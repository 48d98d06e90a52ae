"""The `kserve.Model`: load, healthy, predict, stop.

Joins what others own: the files (`weights.py`), the wire format (`predict.py`), the generation (`engine.py`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import kserve

from model_server.api.prompts import Call, ModelLimits, ServedModel
from model_server.api.routes import accepts_plain_text
from model_server.api.v1.predict import parse
from model_server.api.v1.predictions import answer, plain_text, sse
from model_server.compute.fused_linear import pack
from model_server.compute.kv_cache import budget
from model_server.compute.kv_cache.contiguous import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache
from model_server.engine.config import EngineConfig
from model_server.engine.engine import Engine
from model_server.errors import StartupError
from model_server.loading import weights
from model_server.settings import Settings
from model_server.telemetry import metrics, startup, termination

log = logging.getLogger(__name__)

T = TypeVar("T")
AnyCall = TypeVar("AnyCall", bound=Call)

MAX_PREFILL_TOKENS_PER_STEP = {"cpu": 128, "cuda": 512}
"""Prompt tokens that a step prefills: enough to keep the matmuls busy, few enough that streams do not stall."""
MAX_PREFILL_TOKENS_WHEN_IDLE = 512
"""The same while few streams would wait, for prompts that the step completes: a CPU computes them faster together."""


class MistralModel(kserve.Model):
    """One Mistral model, generating for many requests at once."""

    served: ServedModel
    """What the routes need to know of the loaded model."""
    created_s: int
    """When the model was loaded, in seconds since 1970: what OpenAI's list of models calls `created`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_name)
        self.settings = settings
        self.llm_engine: Engine | None = None
        """KServe's base class has taken the name `engine` for a flag."""

    def load(self) -> bool:
        """Read the model, start the engine, and generate a little, so that the first request is as fast.

        Raises:
            StartupError: the model cannot be served; the sentence says what to do.
        """
        began_s = time.monotonic()
        loaded = _in_passing_thread(lambda: _loaded(self.settings))
        startup.ended("weights")
        for reason in loaded.reasons:
            log.info("%s", reason)
        limits = ModelLimits(
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.model.config.vocab_size,
            eos_token_ids=_eos_token_ids(loaded.model.generation_config.eos_token_id),
        )
        self.served = ServedModel(self.name, loaded.text, limits)
        self.created_s = int(time.time())
        runner, room = _runner(loaded, self.settings.max_batch_size)
        self.llm_engine = Engine(
            runner,
            loaded.text.tokenizer,
            EngineConfig(
                max_batch_size=room.num_rows,
                max_fallback_tokens=room.own_lane_tokens,
                max_queue_size=self.settings.max_queue_size,
                max_prefill_tokens_per_step=MAX_PREFILL_TOKENS_PER_STEP[loaded.device.type],
                max_prefill_tokens_when_idle=MAX_PREFILL_TOKENS_WHEN_IDLE,
                prefix_caching=self.settings.prefix_caching,
                stall_s=self.settings.stall_seconds,
            ),
            on_death=functools.partial(termination.leave, for_next_start=True),
        )
        self.llm_engine.start()
        self._warm_up()
        startup.ended("warm-up")
        engine = self.llm_engine
        metrics.watch_engine(lambda: engine.running, lambda: engine.waiting, lambda: engine.kv_usage)
        metrics.load_seconds.set(time.monotonic() - began_s)
        log.info("loaded in %.1f s, of which %.1f s reading", time.monotonic() - began_s, loaded.load_seconds)
        self.ready = True
        return self.ready

    @property
    def dead(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        return self.llm_engine.dead if self.llm_engine else None

    async def healthy(self) -> bool:
        """Say whether new requests are taken: not while loading, draining or dead."""
        return self.ready and self.llm_engine is not None and self.llm_engine.accepting

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | AsyncIterator[bytes]:
        """Return the whole answer, or its stream once the first event is there.

        Raises:
            ServeError: the request is wrong, or cannot be taken, or failed before its first event.
        """
        headers = headers or {}
        request_id = headers.get("x-request-id", "")
        call = await self.submit(lambda deadline_s: parse(payload, self.served, request_id, deadline_s))
        if not call.stream:
            return await answer(call)
        return await (plain_text(call) if accepts_plain_text(headers) else sse(call))

    async def submit(self, parse: Callable[[float], AnyCall]) -> AnyCall:
        """Parse a body, given its deadline, and have its requests generated.

        Raises:
            ServeError: nothing is taken at the moment, or the body is wrong.
        """
        assert self.llm_engine is not None, "KServe registers a model only once it is loaded"
        self.llm_engine.ensure_accepting()
        # In a thread: a prompt that fills the window takes the tokenizer long enough for other streams to notice.
        call = await asyncio.to_thread(parse, time.monotonic() + self.settings.request_timeout_seconds)
        self.llm_engine.submit(call.requests)
        return call

    async def drain(self, seconds: float) -> None:
        """Take no more requests; return when those taken have ended, by themselves or because time is up."""
        if self.llm_engine is not None:
            await self.llm_engine.drain(seconds)

    def stop(self) -> None:
        """End the engine's thread."""
        self.ready = False
        if self.llm_engine is not None:
            self.llm_engine.stop()

    def _warm_up(self) -> None:
        try:
            asyncio.run(self.predict({"prompt": "Hello", "max_new_tokens": 2, "temperature": 0}))
        except Exception as error:
            log.debug("warm-up failed", exc_info=error)
            raise StartupError(f"The model is loaded but cannot generate: {error}") from error


def _loaded(settings: Settings) -> weights.LoadedModel:
    loaded = weights.load(weights.resolve(settings), settings)
    pack(loaded.model)
    return loaded


def _runner(loaded: weights.LoadedModel, max_batch_size: int) -> tuple[Runner, budget.Capacity]:
    """Give the model as much KV memory as there is, in the form that its device computes best."""
    config = loaded.model.config
    refusal = flash_attention_unavailable_reason(config, loaded.dtype, loaded.device)
    room = budget.plan(
        config,
        loaded.dtype,
        loaded.device,
        free_bytes=weights.free_bytes(loaded.device),
        max_model_len=loaded.max_model_len,
        max_batch_size=max_batch_size,
        equal_rows=refusal is not None,
    )
    log.info("%s", room.reason)
    if refusal is None:
        log.info("keys and values: each request reserves what it may need; read by flash attention")
    else:
        log.info("keys and values: each request reserves %d tokens; flash attention: %s", loaded.max_model_len, refusal)
    memory = make_kv_cache(
        config,
        loaded.dtype,
        loaded.device,
        num_rows=room.num_rows,
        num_tokens=room.num_tokens,
        max_sequence_tokens=loaded.max_model_len,
        flash=refusal is None,
    )
    runner = Runner(loaded.model, memory)
    runner.record_graphs(room.num_rows)
    return runner, room


def _in_passing_thread(work: Callable[[], T]) -> T:
    """Return what the work returns, done in a thread that ends with it.

    OpenMP keeps a team of threads for each thread that has computed, as long as that one lives; and with more of them
    than cores it puts waiting ones to sleep at every barrier. Measured: a decode step of the batch took 1.3 times
    as long when the main thread had loaded the model.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        return pool.submit(work).result()


def _eos_token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return what Transformers writes as nothing, one or several as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
