"""Helpers for the playground's page in a browser: send a prompt, and wait for a text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.support.scripted_server import (
    DONE,
    event,
    last_event,
    stream,
)

ANSWER = stream(event("Forty"), event("-two, "), event("na\u00efve \U0001f642."), last_event(5), DONE)
ANSWER_TEXT = "Forty-two, na\u00efve \U0001f642."
Open = Callable[..., Any]


def shows(page: Any, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait until the element contains the text."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=20_000)


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Control+Enter")
