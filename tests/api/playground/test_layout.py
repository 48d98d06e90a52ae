"""The page fits narrow windows, follows the theme, and names every control."""

from __future__ import annotations

import pytest

from tests.support.playground_page import Open, ask, shows


def test_the_theme_follows_the_system_until_it_is_chosen(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 19, 17)"
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(paper) == "rgb(248, 246, 242)"
    page.reload()
    assert page.evaluate(paper) == "rgb(248, 246, 242)"


def test_every_control_has_a_name(open_page: Open) -> None:
    unnamed = """[...document.querySelectorAll("input, textarea, select, button")]
        .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map((e) => e.outerHTML)"""
    assert open_page().evaluate(unnamed) == []


@pytest.mark.parametrize("width", [320, 390, 901])
def test_nothing_is_wider_than_the_window(open_page: Open, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 700})
    ask(page, "w" * 300)
    shows(page, "#status", "Done")
    assert page.evaluate("document.documentElement.scrollWidth") == width
