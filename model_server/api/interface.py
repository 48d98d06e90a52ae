"""What the routes need of a model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol, TypeVar

from model_server.api.prompts import Call, ServedModel

AnyCall = TypeVar("AnyCall", bound=Call)


class Model(Protocol):
    """The model's interface for the routes; `model.MistralModel` implements it."""

    name: str
    served: ServedModel
    created_s: int
    """When the model was loaded, in seconds since 1970."""

    @property
    def dead(self) -> str | None:
        """The reason why the engine has died, or None."""
        ...

    @property
    def degraded(self) -> list[str]:
        """GPU features that do not work, which makes the server slower."""
        ...

    async def healthy(self) -> bool:
        """Return whether new requests are accepted."""
        ...

    async def predict(self, payload: Any, headers: Mapping[str, str]) -> dict[str, Any] | AsyncGenerator[bytes, None]:
        """Return the answer, or its stream once the first event is there."""
        ...

    async def submit(self, parse: Callable[[float], AnyCall]) -> AnyCall:
        """Parse a body, given its deadline, and submit its requests to the engine."""
        ...
