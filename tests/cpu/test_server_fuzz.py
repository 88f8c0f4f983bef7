"""Anything at all as a body, and anything at all as bytes: only valid answers or typed 4xx, and others unharmed."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from api_cases import MESSAGES, PROMPT, idle, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from server_cases import Raw, Serving, ask, eventually, get, post, serving

import api
from api.arguments import TABLE, Action
from api.http.limits import HttpLimits
from api.http.openapi import PATHS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CANARY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
# LLAMA_LONG=1: ten thousand bodies for each endpoint, ten thousand byte streams.
LONG_FORM = bool(os.environ.get("LLAMA_LONG"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Iterator[Serving]:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file, context=64)
    with serving(api.AsyncClient(folder, block_size=16), limits=HttpLimits(send=2.0)) as running:
        yield running


def check_canary(served: Serving, wanted: Any) -> None:
    assert ask(served.port, post(COMPLETIONS, CANARY)).json["choices"] == wanted


@pytest.fixture(scope="module")
def canary(served: Serving) -> Any:
    return ask(served.port, post(COMPLETIONS, CANARY)).json["choices"]


# --- bodies ------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)  # NUL and lone surrogates among them
NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**63, -(2**63), 2**70, 1e308, -1e308, 1e-320]),
    st.floats(allow_nan=False, allow_infinity=False),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
        "content": st.one_of(TEXTS, ANYTHING),
    }
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.one_of(st.just(MESSAGES), st.lists(MESSAGE, max_size=4)),
    "prompt": st.one_of(TEXTS, st.lists(TEXTS, max_size=3), st.lists(st.integers(-1, 400), max_size=5)),
    "stop": st.one_of(TEXTS, st.lists(TEXTS, max_size=5)),
    "logit_bias": st.dictionaries(st.one_of(st.integers(-1, 401).map(str), TEXTS), NUMBERS, max_size=3),
    "stop_token_ids": st.lists(NUMBERS, max_size=3),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
}
FLAGS = ("stream", "echo", "logprobs", "ignore_eos", "return_token_ids", "explain", "strict")


def bodies(endpoint: Any) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        name: st.one_of(LIKELY.get(name, st.booleans() if name in FLAGS else NUMBERS), ANYTHING)
        for name in TABLE[endpoint]
        if name != "model"
    }
    prompt = {"messages": st.just(MESSAGES)} if endpoint == "chat" else {"prompt": st.just(PROMPT)}
    some = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    known = st.fixed_dictionaries({"model": st.just("tiny"), **prompt})
    return st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, known, some)


def check(served: Serving, path: str, body: dict[str, Any]) -> None:
    answer = ask(served.port, post(path, {"max_tokens": 3} | body))
    if answer.status == 200 and body.get("stream"):
        assert answer.events[-1] == "[DONE]"
    elif answer.status == 200:
        assert answer.json["usage"]["total_tokens"] > 0
    else:
        assert 400 <= answer.status < 500
        error = answer.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["code"], str)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_generated_bodies(served: Serving, canary: Any, endpoint: str) -> None:
    path = CHAT if endpoint == "chat" else COMPLETIONS
    count = [0]

    @settings(
        max_examples=10_000 if LONG_FORM else 250, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(bodies(endpoint))
    def each(body: dict[str, Any]) -> None:
        check(served, path, body)
        count[0] += 1
        if count[0] % 50 == 0:
            check_canary(served, canary)

    each()
    check_canary(served, canary)


@pytest.mark.parametrize("extreme", [1e-320, 1e-45, 1e-38, 1e-7])
def test_found_by_chance_a_penalty_that_overflowed(served: Serving, extreme: float) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "repetition_penalty": extreme, "max_tokens": 3}
    assert ask(served.port, post(COMPLETIONS, body)).status == 200


# --- bodies made from our own description ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(served: Serving) -> Any:
    return ask(served.port, get("/openapi.json")).json


def test_the_description_is_valid_and_complete(served: Serving, described: Any, canary: Any) -> None:
    assert set(described["paths"]) == {CHAT, COMPLETIONS}
    for endpoint, path in PATHS.items():
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(body["properties"]) == {n for n, row in TABLE[endpoint].items() if row.action is Action.HONOURED}
        jsonschema.Draft202012Validator.check_schema(body)
    answer = ask(served.port, post(CHAT, {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "n": 2})).json
    schema = {"$ref": "#/components/schemas/ChatCompletion", "components": described["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bodies_by_our_description(served: Serving, canary: Any, described: Any, path: str, mode: Any) -> None:
    """Right and wrong ones: an answer, or a typed 4xx; the canary is the same all through."""
    operation = schemathesis.openapi.from_dict(described)[path]["POST"]
    seen: Counter[int] = Counter()

    @settings(
        max_examples=5000 if LONG_FORM else 75, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        body = case.body
        data = b"" if not isinstance(body, (dict, list, str, int, float, type(None))) else json.dumps(body).encode()
        answer = ask(served.port, post(path, data))
        seen[answer.status] += 1
        if answer.status == 200:
            assert answer.events[-1] == "[DONE]" if body.get("stream") else answer.json["usage"]
        else:
            assert 400 <= answer.status < 500, (body, answer)
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        if seen.total() % 50 == 0:
            check_canary(served, canary)

    each()
    check_canary(served, canary)
    print(path, mode.value, dict(seen))


# --- bytes -------------------------------------------------------------------------------------------------------

SEEDS = [
    post(COMPLETIONS, CANARY),
    post(CHAT, {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stream": True}),
    post(COMPLETIONS, b'5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n', {"Transfer-Encoding": "chunked", "Content-Length": ""}),
    get("/health"),
    get("/v1/models") + get("/metrics"),
]
HOSTILE = [
    b"",
    b"\r\n\r\n\r\n",
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: yes\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"GET / HTTP/1.1\nHost: localhost\n\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n",
]


def mutated(rng: random.Random) -> bytes:
    """A request with some bytes changed, left out, put in or said twice."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1)
        what = rng.randrange(4)
        if what == 0 and place < len(data):
            data[place] = rng.randrange(256)
        elif what == 1:
            del data[place : place + rng.randint(1, 8)]
        elif what == 2:
            data[place:place] = rng.choice([b"\r\n", b"\n", b"\x00", b": ", b"chunked", b"\xff" * 9, rng.randbytes(5)])
        else:
            data[place:place] = data[place : place + 20]
    return bytes(data)


def say(served: Serving, data: bytes, patience: float = 0.03) -> None:
    """Send bytes, and read what comes: nothing, or answers that are no 5xx."""
    with Raw(served.port, timeout=patience) as raw, suppress(EOFError, OSError):
        raw.send(data)
        while True:
            answer = raw.answer()
            assert answer.status < 500, (data, answer)


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[-40:]))
def test_hostile_bytes(served: Serving, canary: Any, data: bytes) -> None:
    say(served, data)
    check_canary(served, canary)


def test_malformed_bytes(served: Serving, canary: Any) -> None:
    rng = random.Random(5)
    for number in range(10_000 if LONG_FORM else 300):
        say(served, mutated(rng))
        if number % 50 == 0:
            check_canary(served, canary)
    client = served.app.client
    assert client is not None
    eventually(lambda: served.app.active == 0 and idle(client))


def test_half_open_sockets_harm_nobody(served: Serving, canary: Any) -> None:
    """300 that never finish their request: a good client is as fast as before, and the 300 are closed."""

    def median() -> float:
        times = []
        for _ in range(15):
            started = time.monotonic()
            check_canary(served, canary)
            times.append(time.monotonic() - started)
        return sorted(times)[7]

    alone = median()
    half_open = [Raw(served.port) for _ in range(300)]
    for number, raw in enumerate(half_open):
        raw.send(post(COMPLETIONS, json.dumps(CANARY).encode())[: number % 40])
    assert median() < 3 * alone + 0.05
    eventually(served.at_rest)
    for raw in half_open:
        raw.close()
