"""Take the pictures of the playground in docs/images from a running server: make run, then make screenshots.

python -m docs.take_screenshots [URL]

Needs Chromium on the PATH. The text in the pictures is what the served model answers.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

IMAGES = Path(__file__).with_name("images")
QUESTION = "What is continuous batching?"
"""A question of docs/faq.md, which the demo model can answer."""


def ask(page: Page, url: str) -> None:
    """Send the question in the playground and wait for the end of the answer."""
    page.goto(f"{url}/playground")
    page.fill("#prompt", QUESTION)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done", timeout=60_000)


def main() -> int:
    """Write one picture for each colour scheme."""
    url = (sys.argv[1:] or ["http://localhost:8080"])[0].rstrip("/")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("There is no Chromium on the PATH: install it (Debian: apt-get install chromium).", file=sys.stderr)
        return 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            ask(page, url)
            page.screenshot(path=IMAGES / f"playground-{scheme}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
