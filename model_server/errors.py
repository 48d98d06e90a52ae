"""Every error a client or an operator can meet, defined once.

ServeError                     the root: an HTTP status, a code word, one sentence
 ├─ BadRequest          400    bad_request          a field is wrong; the sentence names it
 │   └─ GrammarTooComplex 400  grammar_too_complex  a grammar exceeded its limits during an answer
 ├─ Unauthorized        401    unauthorized         no key, or an unknown one
 ├─ UnknownRoute        404    not_found            no such path
 │   └─ UnknownModel    404    model_not_found      no such model here
 ├─ MethodNotAllowed    405    method_not_allowed   the path exists, the method does not
 ├─ TooSlow             408    too_slow             the body arrives too slowly
 ├─ BodyTooLarge        413    body_too_large       larger than --max_request_bytes
 ├─ QueueFull           429    queue_full           the queue is full; try again later
 │   └─ KeyBusy         429    key_busy             the limit of requests for this key is reached
 ├─ HeadersTooLarge     431    headers_too_large    too many headers, or too long ones
 ├─ Unavailable         503    unavailable          the request is valid, but cannot be served now
 │   ├─ NotReady        503    not_ready            still loading
 │   ├─ Draining        503    draining             shutting down
 │   ├─ OutOfMemory     503    out_of_memory        preempted to keep older requests running
 │   ├─ TimedOut        503    timed_out            --request_timeout_seconds passed before the first token
 │   └─ EngineDead      503    engine_dead          the generation thread has died; the kubelet restarts the server
 └─ InternalError       500    internal             an error of the server; the log has the details

StartupError                   the process cannot start; `__main__` prints the sentence and exits with 1

Status and code sit on the class. One handler (`middleware.py`) turns the tree into JSON; once a stream has begun the
same error becomes one `event: error`. This module imports no other module of the project.
"""

from __future__ import annotations


class ServeError(Exception):
    """Base of the errors that a client gets; `str(error)` is the message."""

    status: int = 500
    code: str = "internal"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.field = field
        """Name of the wrong request field, for error formats that contain it (OpenAI's `param`)."""
        self.retry_after_s = retry_after_s
        """Seconds for the `Retry-After` header; None sends none."""

    def body(self) -> dict[str, str]:
        """Return the JSON object of the V1 wire format."""
        return {"error": str(self), "code": self.code}

    def openai_body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON object of OpenAI's wire format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


class BadRequest(ServeError):
    status, code = 400, "bad_request"


class GrammarTooComplex(BadRequest):
    code = "grammar_too_complex"


class Unauthorized(ServeError):
    status, code = 401, "unauthorized"


class UnknownRoute(ServeError):
    status, code = 404, "not_found"


class UnknownModel(UnknownRoute):
    status, code = 404, "model_not_found"


class MethodNotAllowed(ServeError):
    status, code = 405, "method_not_allowed"


class TooSlow(ServeError):
    status, code = 408, "too_slow"


class BodyTooLarge(ServeError):
    status, code = 413, "body_too_large"


class QueueFull(ServeError):
    status, code = 429, "queue_full"


class KeyBusy(QueueFull):
    code = "key_busy"


class HeadersTooLarge(ServeError):
    status, code = 431, "headers_too_large"


class Unavailable(ServeError):
    """A 503, which always has `Retry-After` (by default 5 s)."""

    status, code = 503, "unavailable"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: int | None = 5) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)


class NotReady(Unavailable):
    code = "not_ready"


class Draining(Unavailable):
    code = "draining"


class OutOfMemory(Unavailable):
    code = "out_of_memory"


class TimedOut(Unavailable):
    code = "timed_out"


class EngineDead(Unavailable):
    code = "engine_dead"


class InternalError(ServeError):
    status, code = 500, "internal"

    def __init__(
        self,
        message: str = "The server failed on this request; the log has the details.",
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)


class StartupError(Exception):
    """The server cannot start; `str(error)` is one sentence that says what to do."""
