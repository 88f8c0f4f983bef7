"""The playground in a real browser, as on a desk and as on a phone: ask, stream, stop, read, and what goes wrong.

The browser is Debian's (apt-get install chromium), not one that playwright downloads; these tests are skipped without.
PLAYGROUND_PICTURE=docs/playground.png also takes the picture that the documentation shows.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from api_cases import scripted
from server_cases import Raw, Serving, ask, eventually, get, post, serving

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


@contextmanager
def opened(browser: Any, served: Serving, **context: Any) -> Iterator[Any]:
    """The page, opened with the right key; nothing is fetched from elsewhere, no script fails, and none is refused."""
    page = browser.new_context(**context).new_page()
    asked: list[str] = []
    failed: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda said: failed.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(served.url)
    page.locator(".error").wait_for()  # no key yet
    if context.get("is_mobile"):
        page.tap("[aria-controls=settings]")
    type_key(page, "right")
    page.locator("#model option").first.wait_for(state="attached")
    page.locator("#clear").click()
    yield page
    page.context.close()
    assert not failed
    assert all(url.startswith(served.url) for url in asked)


@pytest.fixture
def page(served: Serving, browser: Any) -> Iterator[Any]:
    size = {"width": 1000, "height": 640}
    with opened(browser, served, viewport=size, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


@pytest.fixture
def phone(served: Serving, browser: Any) -> Iterator[Any]:
    with opened(browser, served, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True) as page:
        yield page


@contextmanager
def written(served: Serving, text: str, pause: float = 0.0) -> Iterator[None]:
    """Every answer is this text, a token in `pause` seconds."""
    assert served.app.client is not None
    body = {"prompt": text, "add_special_tokens": False}
    tokens = ask(served.port, post("/tokenize", body, {"Authorization": "Bearer right"})).json["tokens"]
    with scripted(served.app.client, lambda index, prompt: tokens) as script:
        script.gate = lambda: time.sleep(pause)
        yield
        eventually(lambda: served.app.client.stats().running == 0)


def render(page: Any, *texts: str) -> str:
    """The HTML of what `Markdown` makes of texts that follow one another, as a text grows."""
    return page.evaluate(
        """async texts => {
            const { Markdown } = await import("./page/markdown.js");
            const markdown = new Markdown(document.createElement("div"));
            for (const text of texts) markdown.show(text);
            return markdown.element.innerHTML;
        }""",
        texts,
    )


def type_key(page: Any, key: str) -> None:
    page.fill("#key", key)
    page.locator("#key").dispatch_event("change")


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_the_page_names_nothing_outside(served: Serving) -> None:
    texts = {path.name: path.read_text() for path in PAGE.parent.iterdir() if path.name != "marked.LICENSE"}
    assert "MIT License" in texts["marked.js"][:300] and "v18.2.1" in texts["marked.js"][:300]
    for name, text in texts.items():
        if name != "marked.js":  # a comment of it names its home
            assert not re.search(r"https?://|@import|url\(", text), name
    named = re.findall(r"(?:src|href)\s*=\s*\"([^\"]*)", texts[PAGE.name])
    assert named == ["page/playground.css", "page/app.js"]  # relative: the page may lie under any path
    for name in texts.keys() - {PAGE.name}:
        answer = ask(served.port, get(f"/page/{name}"))  # without a key, as the page itself
        assert (answer.status, answer.body.decode()) == (200, texts[name])
    assert ask(served.port, get("/page/marked.LICENSE")).status == 401


def test_no_text_can_become_code(served: Serving) -> None:
    policy = ask(served.port, get("/")).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "trusted-types 'none'" in policy


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
    sync_api.expect(page.locator(".note").first).to_have_text("Copy")  # it is complete: there is nothing to say


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
        sync_api.expect(page.locator(".note")).to_contain_text("Stopped by you.")
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
    page.fill("#text", "typed meanwhile")
    page.locator(".error").last.get_by_role("button").click()
    sync_api.expect(page.locator("#key")).to_be_focused()
    sync_api.expect(page.locator("#trouble")).to_have_text("The numbers need the API key.")
    type_key(page, "right")
    sync_api.expect(page.locator(".error")).to_have_count(1)  # the one about the slots
    sync_api.expect(page.locator("#trouble")).to_be_hidden()


def test_a_new_conversation_drops_the_answer_on_its_way(page: Any, served: Serving) -> None:
    client = served.app.client
    assert client is not None
    with written(served, "On and on. " * 200, pause=0.02):
        say(page, "Go on for ever.")
        page.locator(".assistant:not(:empty)").wait_for()
        page.click("#clear")
        sync_api.expect(page.locator("#talk > *")).to_have_count(0)
        eventually(lambda: client.stats().slots_in_use == 0, seconds=1.0)
        eventually(lambda: client.stats().running == 0)
    sync_api.expect(page.locator("#stop")).to_be_disabled()
    page.fill("#temperature", "0")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Say 'Test'.")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "Say 'Test'."}]
    sync_api.expect(page.locator(".assistant")).to_contain_text("Sure! Test.")
    sync_api.expect(page.locator(".error")).to_have_count(0)


def test_an_answer_of_an_old_conversation_does_not_end_the_new_one(page: Any, served: Serving) -> None:
    with written(served, "On and on. " * 200, pause=0.02):
        say(page, "The first.")
        page.locator(".assistant:not(:empty)").wait_for()
        page.evaluate("document.getElementById('clear').click()")  # at once, before the first has ended
        say(page, "The second.")
        page.locator(".assistant:not(:empty)").wait_for()
        sync_api.expect(page.locator("#stop")).to_be_enabled()
        sync_api.expect(page.locator(".user")).to_have_text("The second.")
        page.keyboard.press("Escape")
        sync_api.expect(page.locator(".note")).to_contain_text("Stopped by you.")


def test_a_new_conversation_before_the_first_word(page: Any, served: Serving) -> None:
    """The dropped question does not come back, as one does that got no answer."""
    with written(served, "On and on.", pause=0.5):
        with page.expect_event("requestfailed"):
            say(page, "The first.")
            page.locator(".answer").wait_for()
            page.click("#clear")
        assert page.input_value("#text") == ""
        say(page, "The second.")
        sync_api.expect(page.locator("#stop")).to_be_enabled()
        sync_api.expect(page.locator(".assistant")).to_have_text("On and on.")
    sync_api.expect(page.locator("#talk > *")).to_have_count(2)


def test_a_cut_answer_says_so(page: Any, served: Serving) -> None:
    page.fill("#max_tokens", "4")
    with written(served, "On and on. " * 900):
        say(page, "Go on.")
        sync_api.expect(page.locator(".note")).to_contain_text("Cut off at max_tokens = 4.")
        page.click("#clear")
        page.fill("#max_tokens", "")
        say(page, "Go on.")
        sync_api.expect(page.locator(".note")).to_contain_text(re.compile(r"the context of \d+ tokens is full"))


def test_keys_and_names(page: Any) -> None:
    page.fill("#text", "one")
    page.press("#text", "Shift+Enter")
    page.locator("#text").press_sequentially("two")
    assert page.input_value("#text") == "one\ntwo"
    sync_api.expect(page.locator(".user")).to_have_count(0)
    nameless = """() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter(one => !(one.labels?.[0] ?? one).innerText.trim() && !one.ariaLabel).map(one => one.id)"""
    assert page.evaluate(nameless) == []


# --- reading ---------------------------------------------------------------------------------------------------------


def test_scrolling_up_while_it_streams_is_respected(page: Any, served: Serving) -> None:
    at_end = (
        "() => { const t = document.getElementById('talk'); return t.scrollHeight - t.scrollTop - t.clientHeight < 2; }"
    )
    with written(served, "On and on.\n\n" * 160, pause=0.01):
        say(page, "Go on.")
        page.locator(".assistant p").nth(30).wait_for()
        assert page.evaluate(at_end)
        page.hover("#talk")
        page.mouse.wheel(0, -300)
        page.locator("#latest").wait_for()
        before = page.evaluate("document.getElementById('talk').scrollTop")
        count = page.locator(".assistant p").count()
        page.locator(".assistant p").nth(count + 15).wait_for(state="attached")
        assert page.evaluate("document.getElementById('talk').scrollTop") == before
        page.click("#latest")
        page.locator(".assistant p").nth(count + 30).wait_for()
        sync_api.expect(page.locator("#latest")).to_be_hidden()
        assert page.evaluate(at_end)
        page.click("#stop")


MARKDOWN = """A *slot* is a **seat** &amp; a row, see https://example.com and [the guide](https://example.com/guide).

### Shared

1. first
2. second
   - inner
- [x] done

| setting | value |
|:--|--:|
| `slots` | 30<br>at once |

```python
print("a < b")
```

> It ends here."""


def test_markdown(page: Any, served: Serving) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    with written(served, MARKDOWN, pause=0.005):
        say(page, "What is a slot?")
        page.locator("#stop:disabled").wait_for()
    answer = page.locator(".assistant")
    for selector, text in {
        "strong": "seat",
        "h5": "Shared",
        "ol > li": "first",
        "ul li": "inner",
        "th": "setting",
        "td.right": "30\nat once",
        "td code": "slots",
        "pre code": 'print("a < b")',
        "blockquote": "It ends here.",
        "a[target=_blank][rel~=noopener]": "the guide",
    }.items():
        assert text in answer.locator(selector).all_inner_texts(), selector
    sync_api.expect(answer).to_contain_text("& a row")
    answer.get_by_role("button", name="Copy").click()
    sync_api.expect(answer.get_by_role("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'print("a < b")'
    page.locator(".note button").click()
    sync_api.expect(page.locator(".note button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    sync_api.expect(page.locator(".note button")).to_have_text("Copy")


def test_a_page_without_tls_can_copy(page: Any, served: Serving) -> None:
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    with written(served, "Copy me."):
        say(page, "What?")
        page.locator(".note button").click()
        sync_api.expect(page.locator(".note button")).to_have_text("Copied")


@pytest.mark.parametrize("step", [1, 7])
def test_a_growing_text_ends_as_the_whole_one(page: Any, step: int) -> None:
    text = MARKDOWN + "\n\n[late]\n\n[late]: https://example.com/late\n\n```\nnever closed\n\n# not a heading"
    parts = [text[:n] for n in range(0, len(text), step)]
    assert render(page, *parts, text) == render(page, text)
    assert "<h3>" not in render(page, text)


HOSTILE = [
    "<script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'>",
    "text <b onclick='window.owned = 1'>bold</b> <svg/onload=window.owned=1> <iframe src='https://example.com'>",
    "[a](javascript:window.owned=1) [b](JaVaScRiPt&colon;window.owned=1) [c](data:text/html,<script>owned=1</script>)",
    "[d](java\tscript:window.owned=1) <javascript:window.owned=1> [e](/v1/models) [f](//example.com)",
    "[g]: javascript:window.owned=1\n\n[g] ![i](https://example.com/i.png) ![j](javascript:1)",
    "| <style>*{display:none}</style> | <a href='javascript:window.owned=1'>x</a> |\n|-|-|\n| <br onload=1> | <br/> |",
    "```<img src=x onerror=window.owned=1>\n</code></pre><script>window.owned = 1</script>",
    "&lt;script&gt;window.owned = 1&lt;/script&gt; &#60;img src=x onerror=window.owned=1&#62; &#0; &#x110000; &#xd800;",
    "<!-- --><meta http-equiv=refresh content='0;url=https://example.com'><base href=//example.com><form action=x>",
]


def test_hostile_answers_stay_text(page: Any) -> None:
    harmless = {*("P", "BR", "SPAN", "A", "PRE", "CODE"), *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD")}
    ours = {"DIV", "HEADER", "BUTTON"}
    for text in HOSTILE:
        for part in (text, text[: len(text) // 2], text.upper()):
            made = page.evaluate(
                """async text => {
                    const { Markdown } = await import("./page/markdown.js");
                    const box = document.createElement("div");
                    document.getElementById("talk").append(box);
                    new Markdown(box).show(text);
                    const all = [...box.querySelectorAll("*")];
                    for (const one of all) if (one.tagName !== "A") one.click();
                    return all.map(one => [one.tagName, one.getAttributeNames(), one.href ?? ""]);
                }""",
                part,
            )
            assert {tag for tag, _, _ in made} <= harmless | ours, part
            assert {name for _, names, _ in made for name in names} <= {
                "class",
                "href",
                "target",
                "rel",
                "title",
                "type",
            }
            assert all(re.match(r"https://example.com/|$", href) for _, _, href in made), part
    assert page.evaluate("window.owned") is None


@pytest.mark.parametrize(
    "text",
    [
        "> " * 5000,
        ">" * 300 + " deep",
        "\n".join("  " * i + "- item" for i in range(300)),
        "*" * 9000 + "a",
        "[" * 9000,
        "| a |" + " b |" * 300 + "\n|" + "-|" * 301 + "\n" + ("| x " * 301 + "|\n") * 20,
        "| a | b |\n|-|-|\n" + "| x | y |\n" * 3000,
    ],
    ids=["quotes", "quoted deep", "lists", "stars", "brackets", "wide table", "long table"],
)
def test_monstrous_answers_are_shown(page: Any, text: str) -> None:
    made = page.evaluate(
        """async text => {
            const { Markdown } = await import("./page/markdown.js");
            const box = document.createElement("div");
            box.className = "assistant";
            document.getElementById("talk").append(box);
            new Markdown(box).show(text);
            const depth = one => Math.max(0, ...[...one.children].map(child => 1 + depth(child)));
            return [depth(box), box.innerText.length, document.documentElement.scrollWidth <= innerWidth];
        }""",
        text,
    )
    depth, length, fits = made
    assert depth < 80 and length > 0 and fits


# --- the engine ------------------------------------------------------------------------------------------------------


def test_the_panel_shows_what_the_engine_does(page: Any, served: Serving) -> None:
    def shows(name: str, text: str | re.Pattern[str]) -> None:
        sync_api.expect(page.locator(f"#{name} output")).to_have_text(text)

    with written(served, "On and on. " * 200, pause=0.02):
        say(page, "Go on.")
        shows("seats", "1 of 2")
        shows("rows", "1")
        shows("waiting", "0")
        shows("rate", re.compile(r"^\d\d$"))
        shows("cache", re.compile(r"^[1-9]\d* %$"))
        sync_api.expect(page.locator(".cells i")).to_have_count(2)
        sync_api.expect(page.locator(".cells .on")).to_have_count(1)
        page.click("#stop")
    shows("seats", "0 of 2")
    shows("rate", "0.0")
    label = page.locator("#seats svg").get_attribute("aria-label")
    assert label == "now 0 of 2, at most 1 of 2 in the last minute"
    line = page.locator("#rate .line").get_attribute("d")
    heights = [float(point.split()[1]) for point in line.removeprefix("M").split("L")]
    assert min(heights) < 5 and heights[-1] == 31  # it was high, and is down again


# --- a phone ---------------------------------------------------------------------------------------------------------


def test_on_a_phone_the_conversation_comes_first(phone: Any, served: Serving) -> None:
    def seen_whole(selector: str) -> None:
        sync_api.expect(phone.locator(selector)).to_be_in_viewport(ratio=1)

    sync_api.expect(phone.locator("#settings")).to_be_hidden()
    sync_api.expect(phone.locator("#engine")).to_be_hidden()
    assert phone.locator("#talk").bounding_box()["height"] > 844 / 2
    phone.tap("[aria-controls=settings]")
    phone.fill("#temperature", "0")
    phone.fill("#text", "Go on.")
    with written(served, "On and on.\n\n" * 160, pause=0.01):
        phone.tap("#send")
        sync_api.expect(phone.locator("#settings")).to_be_hidden()  # the answer is what one wants to see now
        phone.locator(".assistant p").nth(30).wait_for()
        for selector in ("#text", "#stop", "#send", "#clear"):
            seen_whole(selector)
        assert phone.evaluate("document.documentElement.scrollHeight <= innerHeight && scrollY === 0")
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
        phone.tap("[aria-controls=engine]")
        sync_api.expect(phone.locator("#seats output")).to_have_text("1 of 2")
        seen_whole("#stop")
        phone.tap("#stop")
    phone.tap("[aria-controls=engine]")
    sync_api.expect(phone.locator(".note")).to_contain_text("Stopped by you.")
    seen_whole(".note")


def test_a_wide_table_scrolls_by_itself_on_a_phone(phone: Any, served: Serving) -> None:
    with written(served, "|" + " a column |" * 12 + "\n|" + "-|" * 12 + "\n\n```\n" + "wide " * 40 + "\n```"):
        phone.fill("#text", "A table, please.")
        phone.tap("#send")
        phone.locator(".note").wait_for()
    assert phone.evaluate("(talk => talk.scrollWidth <= talk.clientWidth)(document.getElementById('talk'))")
    assert phone.evaluate("(([t]) => t.scrollWidth > t.clientWidth)(document.querySelectorAll('.scroll'))")


# --- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("PLAYGROUND_PICTURE" not in os.environ, reason="takes the documentation's picture")
def test_the_picture(browser: Any) -> None:
    """The demo's own answers, while others ask for up to 400 tokens at a time, more and more of them."""
    done = threading.Event()

    def others(port: int, number: int) -> None:
        body = {"model": "demo", "prompt": "Once " * 20 * number, "max_tokens": 40 * number, "ignore_eos": True}
        while not done.wait(5.0 * number % 7):
            ask(port, post("/v1/completions", body))

    with serving(api.AsyncClient("demo", slots=30), slots=30) as running:
        threads = [threading.Thread(target=others, args=(running.port, number)) for number in range(1, 11)]
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(running.url)
        page.fill("#temperature", "0")
        questions = ("Hello! What are you?", "What is a slot?", "Can other requests change my answer?")
        for question, more in zip(questions, (threads[:3], threads[3:6], threads[6:]), strict=True):
            say(page, question)
            page.locator(".answer:last-child .note").wait_for()
            for thread in more:
                thread.start()
            time.sleep(18)
        page.screenshot(path=os.environ["PLAYGROUND_PICTURE"])
        done.set()
        for thread in threads:
            thread.join()
        page.close()


# --- between the page and the server ---------------------------------------------------------------------------------


def test_behind_a_proxy_with_tls_and_a_path(served: Serving, browser: Any) -> None:
    """Everything goes to where the page came from. The stand-in for the proxy keeps the browser's Origin to itself."""
    front = "https://chat.example/llama/"
    page = browser.new_page()
    failed: list[str] = []
    page.on("pageerror", lambda error: failed.append(str(error)))

    def forward(route: Any) -> None:
        url = route.request.url
        if not url.startswith(front):
            failed.append(url)
            return route.abort()
        headers = {name: value for name, value in route.request.headers.items() if name != "origin"}
        return route.fulfill(response=route.fetch(url=f"{served.url}/{url.removeprefix(front)}", headers=headers))

    page.route("**/*", forward)
    page.goto(front)
    page.locator(".error").wait_for()
    type_key(page, "right")
    page.locator("#model option").first.wait_for(state="attached")
    page.fill("#temperature", "0")
    say(page, "Say 'Test'.")
    sync_api.expect(page.locator(".assistant")).to_contain_text("Sure! Test.")
    sync_api.expect(page.locator("#seats output")).to_have_text("0 of 2")
    page.unroute_all(behavior="ignoreErrors")
    page.close()
    assert not failed


def test_a_server_that_is_gone_or_not_there_yet(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Is anybody there?")
    sync_api.expect(page.locator(".error")).to_contain_text("The server cannot be reached.")
    assert page.input_value("#text") == "Is anybody there?"
    page.unroute_all()
    page.click("#clear")
    page.evaluate("document.getElementById('model').replaceChildren()")
    body = '{"error": {"message": "The model is loading."}}'
    page.route("**/v1/models", lambda route: route.fulfill(status=503, body=body, headers={"retry-after-ms": "5000"}))
    page.locator("#key").dispatch_event("change")
    sync_api.expect(page.locator(".error")).to_have_text("The model is loading. (try again in 5.0 s)")
    page.unroute_all()
    page.locator("#model option").wait_for(state="attached", timeout=10_000)  # it asks again by itself
    sync_api.expect(page.locator(".error")).to_have_count(0)
