"""The playground in a real browser: ask, stream, stop, no free slot, a wrong key.

The browser is Debian's (apt-get install chromium), not one that playwright downloads; these tests are skipped without.
PLAYGROUND_PICTURE=docs/playground.png also takes the picture that the documentation shows.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_cases import scripted
from server_cases import Raw, Serving, eventually, post, serving

import api

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
(PAGE,) = Path(api.__file__).parent.rglob("playground.html")


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(api.AsyncClient("demo", slots=2), slots=2, keys=["right"]) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(served: Serving, browser: Any) -> Iterator[Any]:
    """The page, opened with the right key; nothing is fetched from elsewhere, and no script fails."""
    page = browser.new_page(viewport={"width": 1000, "height": 640})
    asked: list[str] = []
    failed: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(served.url)
    page.locator(".error").wait_for()  # no key yet
    type_key(page, "right")
    page.locator("#model option").first.wait_for(state="attached")
    page.locator("#clear").click()
    yield page
    page.close()
    assert not failed
    assert all(url.startswith(served.url) for url in asked)


def type_key(page: Any, key: str) -> None:
    page.fill("#key", key)
    page.locator("#key").dispatch_event("change")


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_the_page_names_nothing_outside() -> None:
    assert not re.search(r"https?://|@import|src\s*=|href\s*=", PAGE.read_text())


def test_ask_and_get_a_streamed_answer(page: Any) -> None:
    page.fill("#temperature", "0")
    say(page, "Say 'Test'.")
    page.locator("#stop:disabled").wait_for()
    answer = page.locator(".assistant")
    sync_api.expect(answer).to_have_text("Sure! Test. Is there anything else I can assist you with?")
    sync_api.expect(page.locator("#numbers")).to_contain_text("16 tokens, ")
    sync_api.expect(page.locator("#slots")).to_have_text("slots: 0 of 2 in use")
    say(page, "What is a slot?")
    sync_api.expect(answer).to_have_count(2)
    page.locator("#stop:disabled").wait_for()
    if picture := os.environ.get("PLAYGROUND_PICTURE"):
        page.screenshot(path=picture)


def test_stop(page: Any, served: Serving) -> None:
    client = served.app.client
    assert client is not None
    with scripted(client, lambda index, prompt: [400 + i % 50 for i in range(900)]) as script:
        script.gate = lambda: time.sleep(0.02)
        say(page, "Go on for ever.")
        page.locator(".assistant:not(:empty)").wait_for()
        page.click("#stop")
        page.locator("#stop:disabled").wait_for()
        eventually(lambda: client.stats().slots_in_use == 0, seconds=1.0)
        sync_api.expect(page.locator(".error")).to_have_count(0)
        eventually(lambda: client.stats().running == 0)


def test_no_free_slot_and_a_wrong_key(page: Any, served: Serving) -> None:
    client = served.app.client
    assert client is not None
    with scripted(client, lambda index, prompt: [400] * 900) as script:
        script.gate = lambda: time.sleep(0.02)
        body = {"model": "demo", "prompt": "Once", "max_tokens": 900, "stream": True, "ignore_eos": True}
        request = post("/v1/completions", body, {"Authorization": "Bearer right"})
        with Raw(served.port) as first, Raw(served.port) as second:
            for connection in (first, second):
                connection.send(request).read_until(b"data: ")
            say(page, "Is there room?")
            error = page.locator(".error")
            sync_api.expect(error).to_contain_text("All 2 slots are taken")
            sync_api.expect(error).to_contain_text("try again in")
            assert page.input_value("#text") == "Is there room?"  # nothing typed is lost
        eventually(lambda: client.stats().running == 0)
    type_key(page, "wrong")
    sync_api.expect(page.locator(".error").last).to_contain_text("Incorrect API key")
