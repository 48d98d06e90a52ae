"""The page is served as one file that asks no other host."""

from __future__ import annotations

import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from model_server.api import playground


@pytest.fixture
def web() -> TestClient:
    return TestClient(Starlette(routes=[playground.route()]))


def test_the_page_is_served_with_a_policy_that_allows_only_its_own_code(web: TestClient) -> None:
    answer = web.get("/playground")
    policy = answer.headers["content-security-policy"]
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-[^']{44}'", policy)) == 2


def test_only_get_and_head_are_answered(web: TestClient) -> None:
    assert web.head("/playground").status_code == 200
    assert web.post("/playground").status_code == 405


def test_the_page_can_be_the_body_of_a_refusal() -> None:
    assert playground.response(401).status_code == 401
    assert playground.response(401).body == playground.page()


def test_the_page_names_no_other_host() -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+", playground.page().decode()))
    assert addresses == {"http://www.w3.org"}  # the namespace of SVG, never fetched
