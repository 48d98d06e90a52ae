"""Grammars: which token may come next, by a JSON schema, a regular expression, a list of choices or a Lark grammar.

`GrammarCompiler` compiles a `GrammarSpec` once and hands out one `Matcher` for each sequence. llguidance does the
parsing; its limits bound the time and memory of every step. Leaves out when masks are filled and how they reach the
logits (`compute/token_mask.py`).
"""

from __future__ import annotations

import enum
import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from model_server.errors import BadRequest, GrammarTooComplex, ServeError
from model_server.text.json_schema import check_bounds

MAX_SOURCE_CHARS = 64 * 1024
"""A schema, expression or grammar, as text. OpenAI allows schemas of 120,000 characters over all names and values."""
MAX_CHOICES = 1000
CACHE_SIZE = 64
"""Compiled grammars kept, refused ones included; the least recently used one is dropped first."""

WHITESPACE = r"[ \t\r\n]{0,64}"
"""Between the tokens of JSON. Bounded, because some models write white space without end."""

_LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""What one grammar may cost: by llguidance, 10 ms to build the lexer, 8 ms and 1 ms a step, 40 MB of states."""


class GrammarKind(enum.StrEnum):
    """The field of a request that a grammar came in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "grammar"


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar as a client sends it. Hashable, so that equal ones are compiled once."""

    kind: GrammarKind
    source: str
    """JSON for a schema and for a list of choices, else the expression or the grammar itself."""
    field: str = ""
    """The request field to name in an error; the kind's own name by default."""

    @classmethod
    def json_schema(cls, schema: object, field: str = "json_schema") -> GrammarSpec:
        """Make one from a decoded JSON schema.

        Raises:
            BadRequest: the schema is not an object, or it passes a bound.
        """
        if not isinstance(schema, dict):
            raise BadRequest(f"{field} must be a JSON schema: an object.", field=field)
        check_bounds(schema, field)
        return cls(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False), field)

    @classmethod
    def choice(cls, choices: Sequence[str], field: str = "choice") -> GrammarSpec:
        """Make one from a list of texts, of which the answer is exactly one.

        Raises:
            BadRequest: the list is empty or too long, or an entry is empty.
        """
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise BadRequest(f"{field} must be a list of 1 to {MAX_CHOICES} texts.", field=field)
        if not all(choices):
            raise BadRequest(f"{field} must not hold an empty text.", field=field)
        return cls(GrammarKind.CHOICE, json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False), field)


class Matcher:
    """Where one sequence stands in its grammar. Used by one thread at a time."""

    def __init__(
        self, matcher: LLMatcher, field: str, wake_token_id: int | None = None, first_mask: bytes | None = None
    ) -> None:
        self.field = field
        """The request field that the grammar came in."""
        self.first_mask = first_mask
        """The mask at the start of the grammar; None behind it."""
        self._matcher = matcher
        self._wake_token_id = wake_token_id

    @property
    def active(self) -> bool:
        """False while every token is allowed, as before the token that wakes the grammar."""
        return self._wake_token_id is None

    def accept(self, token_id: int) -> None:
        """Go on by a token that was sampled.

        Raises:
            GrammarTooComplex: the parser passed its limits.
        """
        if self._wake_token_id is not None:
            if token_id == self._wake_token_id:
                self._wake_token_id = None
            return
        self.first_mask = None
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            raise self._too_complex()

    @staticmethod
    def fill_all(matchers: Sequence[Matcher], address: int, num_bytes: int) -> dict[int, ServeError]:
        """Write the masks of several matchers to memory, one behind the other, one bit a token; return the failures.

        One call without the GIL: taken and released for each mask, it would stop the thread that runs the step.
        """
        _executor().unsafe_compute_mask_ptr(
            [(matcher._matcher, i) for i, matcher in enumerate(matchers)],
            address,
            num_bytes // len(matchers),
            len(matchers),
        )
        return {i: matcher._too_complex() for i, matcher in enumerate(matchers) if matcher._matcher.is_error()}

    def _too_complex(self) -> GrammarTooComplex:
        return GrammarTooComplex(
            f"{self.field}: the grammar became too complex in the middle of the answer; simplify it.",
            field=self.field,
        )


@functools.cache
def _executor() -> LLExecutor:
    """Return the threads that fill masks, as many as llguidance takes for this machine; made at the first mask."""
    return LLExecutor()


Compiled = tuple[LLMatcher, bytes] | str
"""A matcher at the start of a grammar with the mask of the first token, or the reason why the grammar is refused."""

_only_compiled = ContextVar("only_compiled", default=False)


class NotCompiled(Exception):
    """The grammar is not compiled yet, and `only_compiled` forbids to compile it."""


@contextmanager
def only_compiled() -> Iterator[None]:
    """Make `GrammarCompiler.compile` raise `NotCompiled` instead of compiling, in this context and in its copies."""
    token = _only_compiled.set(True)
    try:
        yield
    finally:
        _only_compiled.reset(token)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; a compilation may take a second."""

    def __init__(self, tokenizer_json: Callable[[], str], *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Take what is needed to read the tokenizer; it is read at the first grammar, so that a start pays nothing.

        `vocab_size` is the width of the logits, in tokens.
        """
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec, *, wake_token_id: int | None = None) -> Matcher:
        """Return a matcher at the start of the grammar.

        With `wake_token_id` it allows every token until that one, and the grammar begins after it.

        Raises:
            BadRequest: the grammar is wrong, not supported or too large, or no text fits it; names the place.
            NotCompiled: see `only_compiled`.
        """
        field = spec.field or spec.kind.value
        if len(spec.source) > MAX_SOURCE_CHARS:
            raise BadRequest(
                f"{field} has {len(spec.source)} characters; the maximum is {MAX_SOURCE_CHARS}.", field=field
            )
        with self._lock:
            compiled = self._compiled.get(spec)
            if compiled is None:
                if _only_compiled.get():
                    raise NotCompiled
                tokenizer = self._tokenizer or self._read_tokenizer()
        if compiled is None:
            compiled = self._build(spec, tokenizer)
        with self._lock:
            self._compiled[spec] = compiled
            self._compiled.move_to_end(spec)
            if len(self._compiled) > CACHE_SIZE:
                self._compiled.popitem(last=False)
            if not isinstance(compiled, str):
                matcher, first_mask = compiled
                return Matcher(matcher.deep_copy(), field, wake_token_id, first_mask)
        raise BadRequest(f"{field}: {compiled}", field=field)

    def _build(self, spec: GrammarSpec, tokenizer: LLTokenizer) -> Compiled:
        try:
            source = _source(spec)
        except ValueError as error:
            return str(error)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        first_mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():  # a grammar that no text fits fails at its first mask
            return _reason(matcher)
        return matcher, first_mask[: (self._vocab_size + 31) // 32 * 4]

    def _read_tokenizer(self) -> LLTokenizer:
        self._tokenizer = LLTokenizer(
            self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
        )
        return self._tokenizer


def _source(spec: GrammarSpec) -> str:
    """Return the grammar in the form that llguidance takes.

    Raises:
        ValueError: a JSON schema is wrong or not supported.
    """
    if spec.kind is GrammarKind.JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(spec.source, defaults={"whitespace_pattern": WHITESPACE})
    if spec.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(spec.source)
    if spec.kind is GrammarKind.CHOICE:
        choices = json.loads(spec.source)
        # One token of the grammar: as a rule, more than a few hundred choices would pass the limits of a step.
        texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    return LLMatcher.grammar_from_lark(spec.source)


def _reason(matcher: LLMatcher) -> str:
    """Return what is wrong with a grammar as one sentence."""
    message = matcher.get_error() or matcher.stop_reason()
    message = message.split("<state>")[0].strip()
    if message.startswith("NoExtension"):
        return "no text fits this grammar."
    if "too big" in message or "too complex" in message.lower() or "limit" in message:
        return f"the grammar is too large: {' '.join(message.split())[:200]}"
    lines = [line.strip() for line in re.split(r"\n", message) if line.strip() and not re.fullmatch(r"[\s|^]*", line)]
    return " ".join(" ".join(lines).split())[:300]
