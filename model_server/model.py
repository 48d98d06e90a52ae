"""The `kserve.Model`: load, healthy, predict, drain, stop."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import kserve
import torch

from model_server.api.parse_threads import ParseThreads
from model_server.api.prompts import Call, ModelLimits, ServedModel
from model_server.api.routes import accepts_plain_text
from model_server.api.v1.predict import parse
from model_server.api.v1.predictions import answer, plain_text, sse
from model_server.caller import caller
from model_server.engine.config import EngineConfig
from model_server.engine.engine import Engine
from model_server.errors import StartupError
from model_server.loading import loader
from model_server.settings import Settings
from model_server.telemetry import metrics, startup, termination

log = logging.getLogger(__name__)

AnyCall = TypeVar("AnyCall", bound=Call)

MAX_PREFILL_TOKENS_WHEN_IDLE = 512
"""Maximum prompt tokens of a step while few streams decode, if the step completes the prompts."""


class MistralModel(kserve.Model):
    """One Mistral model, generating for many requests at once."""

    served: ServedModel
    """The loaded model's name, tokenizer and limits, for the routes."""
    created_s: int
    """When the model was loaded, in seconds since 1970: `created` in OpenAI's list of models."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_name)
        self.settings = settings
        self.llm_engine: Engine | None = None
        """Not `engine`: KServe's base class uses that name for a flag."""
        self._parse_threads = ParseThreads(settings.max_queue_size)

    def load(self) -> bool:
        """Read the model, start the engine, and generate once, so that the first request is not slower.

        Raises:
            StartupError: the model cannot be served; the sentence says what to do.
        """
        began_s = time.monotonic()
        loaded = loader.load(self.settings)
        limits = ModelLimits(
            max_model_len=loaded.max_model_len, vocab_size=loaded.vocab_size, eos_token_ids=loaded.eos_token_ids
        )
        self.served = ServedModel(self.name, loaded.text, limits)
        self.created_s = int(time.time())
        self.llm_engine = engine = Engine(
            loaded.runner,
            loaded.text.tokenizer,
            EngineConfig(
                max_batch_size=loaded.kv_cache.max_batch_size,
                max_fallback_tokens=loaded.kv_cache.max_fallback_tokens,
                max_queue_size=self.settings.max_queue_size,
                max_prefill_tokens_per_step=loaded.max_prefill_tokens,
                max_prefill_tokens_when_idle=self.settings.max_prefill_tokens
                or max(loaded.max_prefill_tokens, MAX_PREFILL_TOKENS_WHEN_IDLE),
                prefix_caching=self.settings.prefix_caching,
                stall_s=self.settings.stall_seconds,
            ),
            on_death=functools.partial(termination.write, for_next_start=True),
        )
        engine.start()
        self._warm_up()
        startup.phase_ended("warm-up")
        metrics.watch_engine(lambda: engine.running, lambda: engine.waiting, lambda: engine.kv_usage)
        for feature in ("flash_attention", "cuda_graphs"):
            metrics.degraded.labels(feature).set(feature in loaded.runner.missing_features)
        if loaded.device.type == "cuda":
            metrics.watch_gpu_memory(torch.cuda.memory_stats)
        metrics.load_seconds.set(time.monotonic() - began_s)
        log.info("loaded in %.1f s, of which %.1f s reading", time.monotonic() - began_s, loaded.load_seconds)
        self.ready = True
        return self.ready

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | AsyncIterator[bytes]:
        """Return the whole answer, or its stream once the first event is there.

        Raises:
            ServeError: the request is wrong, or cannot be accepted, or failed before its first event.
        """
        headers = headers or {}
        request_id = headers.get("x-request-id", "")
        call = await self.submit(lambda deadline_s: parse(payload, self.served, request_id, deadline_s))
        if not call.stream:
            return await answer(call)
        return await (plain_text(call) if accepts_plain_text(headers) else sse(call))

    async def submit(self, parse: Callable[[float], AnyCall]) -> AnyCall:
        """Parse a body, given its deadline, and submit its requests to the engine.

        Raises:
            ServeError: no request is accepted at the moment, or the body is wrong.
        """
        assert self.llm_engine is not None, "KServe registers a model only once it is loaded"
        self.llm_engine.ensure_accepting()
        deadline_s = time.monotonic() + self.settings.request_timeout_seconds
        call = await self._parse_threads.run(functools.partial(parse, deadline_s))
        for request in call.requests:
            request.caller = caller.get()
        self.llm_engine.submit(call.requests)
        return call

    async def healthy(self) -> bool:
        """Return whether new requests are accepted: not while loading, draining or dead."""
        return self.ready and self.llm_engine is not None and self.llm_engine.accepting

    @property
    def dead(self) -> str | None:
        """The reason why the engine has died, or None."""
        return self.llm_engine.dead if self.llm_engine else None

    @property
    def degraded(self) -> list[str]:
        """GPU features that do not work, which makes the server slower."""
        return self.llm_engine.runner.missing_features if self.llm_engine else []

    async def drain(self, seconds: float) -> None:
        """Accept no more requests; return when the accepted ones have ended or the time is up."""
        if self.llm_engine is not None:
            await self.llm_engine.drain(seconds)

    def stop(self) -> None:
        """Stop the engine's threads."""
        self.ready = False
        if self.llm_engine is not None:
            self.llm_engine.stop()

    def _warm_up(self) -> None:
        try:
            asyncio.run(self.predict({"prompt": "Hello", "max_new_tokens": 2, "temperature": 0}))
        except Exception as error:
            log.debug("warm-up failed", exc_info=error)
            raise StartupError(f"The model is loaded but cannot generate: {error}") from error
