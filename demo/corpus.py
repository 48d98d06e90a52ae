"""The text that the demo model learns: FAQ and small talk, each answer with the ways to ask for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).parent
PAGES = (DEMO.parent / "docs" / "faq.md", DEMO / "small_talk.md")
HEADING = "## "
ELSEWHERE = "See: "


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer and the ways to ask for it, the plainest first."""

    questions: tuple[str, ...]
    answer: str


def entries() -> list[Entry]:
    """Return all that the demo model knows, in the order of the pages."""
    answers: dict[str, str] = {}
    questions: dict[str, list[str]] = {}
    for page in PAGES:
        for asked, answer in _blocks(page.read_text(encoding="utf-8")):
            if answer.startswith(ELSEWHERE):
                questions.setdefault(answer.removeprefix(ELSEWHERE), []).extend(asked)
            else:
                questions.setdefault(asked[0], []).extend(asked)
                answers[asked[0]] = answer
    if unanswered := questions.keys() - answers.keys():
        raise ValueError(f"Nothing answers {sorted(unanswered)}.")
    return [Entry(tuple(questions[first]), answer) for first, answer in answers.items()]


def _blocks(page: str) -> Iterator[tuple[list[str], str]]:
    """Yield the headings that stand together and the text under them, its lines joined."""
    for headings, body in re.findall(rf"((?:^{HEADING}.+\n)+)((?:(?!{HEADING}).*\n?)*)", page, re.MULTILINE):
        yield [line.removeprefix(HEADING) for line in headings.splitlines()], " ".join(body.split())
