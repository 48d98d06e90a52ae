"""Small real objects that stand at the edges."""

from __future__ import annotations


class TokenIds:
    """A detokenizer whose text is the token ids themselves."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.stopped = False

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        return f"{token_id} "

    def flush(self) -> str:
        return ""
