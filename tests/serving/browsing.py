"""A browser, if the machine has one, and what the tests of the page do in it.

CHAT_SHOTS=docs/chat saves the pictures that docs/chat.md shows.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright, which is not installed")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PICTURES = Path(str(files("llavakit") / "pictures"))
DOG, MOONS = PICTURES / "scene-60002004.png", PICTURES / "scene-60002420.png"
SHAPES = [(scheme, width) for scheme in ("light", "dark") for width in (1440, 390)]
FAULTS = (Path(__file__).parent / "page_faults.js").read_text(encoding="utf-8")


@contextmanager
def started() -> Iterator[Browser]:
    """A browser without a window; the test is skipped where there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)} is installed")
    expect.set_options(timeout=15_000)  # a busy machine
    with sync_api.sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def ask(page: Page, words: str, *pictures: Path | dict[str, object]) -> None:
    if pictures:
        before = page.locator("#picked li").count()
        page.set_input_files("#files", list(pictures))
        expect(page.locator("#picked li")).to_have_count(before + len(pictures))
    page.fill("#words", words)
    page.press("#words", "Enter")


def replied(page: Page, count: int) -> None:
    expect(page.locator(".reply.done")).to_have_count(count)


def last(page: Page) -> str:
    return page.locator(".reply .text").last.inner_text()


def shot(page: Page, name: str, *, only: tuple[str, int] | None = None, shape: tuple[str, int] | None = None) -> None:
    """Save what is seen for the docs."""
    folder = os.environ.get("CHAT_SHOTS")
    if folder and (only is None or only == shape):
        page.wait_for_timeout(500)
        seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        seen.save(Path(folder) / f"{name}.png", optimize=True)


def until(page: Page, true: Callable[[], bool]) -> None:
    for _ in range(100):
        if true():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it does not become true")


def sound(page: Page) -> None:
    assert page.evaluate(FAULTS) == []


def file(name: str, data: bytes) -> dict[str, object]:
    return {"name": name, "mimeType": "image/png", "buffer": data}
