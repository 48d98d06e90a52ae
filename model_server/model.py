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

from model_server.api.openai import requests as openai_requests
from model_server.api.parameters import ModelLimits
from model_server.api.predict import Call, answer, parse, plain_text, sse
from model_server.api.routes import accepts_plain_text
from model_server.compute.fused_linear import pack
from model_server.compute.kv_cache import budget
from model_server.compute.kv_cache.contiguous import flash_attention_unavailable_reason
from model_server.compute.runner import Runner, make_kv_cache
from model_server.engine.engine import Engine
from model_server.errors import StartupError
from model_server.loading import weights
from model_server.settings import Settings
from model_server.telemetry import metrics, startup, termination
from model_server.text.tokenizer import Text

log = logging.getLogger(__name__)

T = TypeVar("T")
AnyCall = TypeVar("AnyCall", Call, openai_requests.Call)

PREFILL_TOKENS = {"cpu": 128, "cuda": 512}
"""Prompt tokens read in one step: enough to keep the matmuls busy, few enough that streams do not stall."""
WHOLE_PROMPT_TOKENS = 512
"""The same for whole prompts while few streams would wait: a CPU reads them faster together."""


class MistralModel(kserve.Model):
    """One Mistral model, generating for many requests at once."""

    text: Text
    limits: ModelLimits
    openai_server: openai_requests.Server
    created_s: int
    """When the model was loaded, in seconds since 1970: what OpenAI's list of models calls `created`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_name)
        self.settings = settings
        self.generation: Engine | None = None
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
        self.text = loaded.text
        self.limits = ModelLimits(
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.model.config.vocab_size,
            eos_token_ids=_eos_token_ids(loaded.model.generation_config.eos_token_id),
        )
        self.openai_server = openai_requests.Server(self.name, self.text, self.limits)
        self.created_s = int(time.time())
        runner, room = _runner(loaded, self.settings.max_batch_size)
        self.generation = Engine(
            runner,
            loaded.text.tokenizer,
            max_batch_size=room.num_rows,
            own_lane_tokens=room.own_lane_tokens,
            max_queue_size=self.settings.max_queue_size,
            prefill_tokens=PREFILL_TOKENS[loaded.device.type],
            whole_prompt_tokens=WHOLE_PROMPT_TOKENS,
            prefix_caching=self.settings.prefix_caching,
            stall_s=self.settings.stall_seconds,
            on_death=functools.partial(termination.leave, for_next_start=True),
        )
        self.generation.start()
        self._warm_up()
        startup.ended("warm-up")
        engine = self.generation
        metrics.watch_engine(lambda: engine.running, lambda: engine.waiting, lambda: engine.kv_usage)
        metrics.load_seconds.set(time.monotonic() - began_s)
        log.info("loaded in %.1f s, of which %.1f s reading", time.monotonic() - began_s, loaded.load_seconds)
        self.ready = True
        return self.ready

    @property
    def dead(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        return self.generation.dead if self.generation else None

    async def healthy(self) -> bool:
        """Say whether new requests are taken: not while loading, draining or dead."""
        return self.ready and self.generation is not None and self.generation.accepting

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
        call = await self.submit(lambda deadline_s: parse(payload, self.text, self.limits, request_id, deadline_s))
        if not call.stream:
            return await answer(call)
        return await (plain_text(call) if accepts_plain_text(headers) else sse(call))

    async def submit(self, parse: Callable[[float], AnyCall]) -> AnyCall:
        """Parse a body, given its deadline, and have its requests generated.

        Raises:
            ServeError: nothing is taken at the moment, or the body is wrong.
        """
        assert self.generation is not None, "KServe registers a model only once it is loaded"
        self.generation.check_open()
        # In a thread: a prompt that fills the window takes the tokenizer long enough for other streams to notice.
        call = await asyncio.to_thread(parse, time.monotonic() + self.settings.request_timeout_seconds)
        self.generation.submit(call.requests)
        return call

    async def drain(self, seconds: float) -> None:
        """Take no more requests; return when those taken have ended, by themselves or because time is up."""
        if self.generation is not None:
            await self.generation.drain(seconds)

    def stop(self) -> None:
        """End the engine's thread."""
        self.ready = False
        if self.generation is not None:
            self.generation.stop()

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
    than cores it puts waiting ones to sleep at every barrier. Measured: a decode step of the shared lane took 1.3 times
    as long when the main thread had loaded the model.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        return pool.submit(work).result()


def _eos_token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return what Transformers writes as nothing, one or several as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
