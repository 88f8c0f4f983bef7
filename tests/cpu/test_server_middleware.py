"""Who may come in, with what, and how errors look: head, Host, Origin, key, routes, bodies, deadlines, headers."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from selectors import EVENT_READ
from typing import Any

import openai
import pytest
from api_cases import MESSAGES, PROMPT, write_model
from server_cases import Raw, Serving, ask, eventually, get, head, post, serving

import api
from api.http.json_body import parse_object
from api.http.limits import HttpLimits
from api.http.middleware import Keys
from api.http.retry_after import RetryAfter
from api.http.uvicorn_server import AT_ONCE, InTurn

KEYS = ["sk-first", "sk-second"]
LIMITS = HttpLimits(send=1.0, idle=1.0)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GOOD = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Iterator[api.AsyncClient]:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)
    return api.AsyncClient(folder, block_size=16)


@pytest.fixture(scope="module")
def served(client: api.AsyncClient) -> Iterator[Serving]:
    with serving(client, limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def port(served: Serving) -> int:
    return served.port


@pytest.fixture(autouse=True)
def the_next_request_is_served(port: int) -> Iterator[None]:
    yield
    assert ask(port, post(COMPLETIONS, GOOD)).json["usage"]["completion_tokens"] == 3


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- routes and methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/", "/v1/models/nope", "/docs", "/v1/chat/completions/", "//"])
def test_what_is_not_there(port: int, path: str) -> None:
    answer = ask(port, get(path))
    assert answer.status == 404
    assert answer.code == ("model_not_found" if "models" in path else "unknown_url")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_wrong_methods(port: int, method: str) -> None:
    answer = ask(port, head(method, CHAT, {"Host": "localhost"}))
    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_health_ready_and_the_page(port: int) -> None:
    health = ask(port, get("/health"))
    assert (health.status, health.json["status"]) == (200, "ok")
    assert ask(port, get("/ready")).status == 200
    page = ask(port, get("/"))
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_head_request_has_no_body(port: int) -> None:
    with Raw(port) as raw:
        raw.send(head("HEAD", "/health", {"Host": "localhost"}))
        assert raw.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        raw.send(get("/ready"))
        assert raw.answer().json == {"status": "ready"}


# --- Host, Origin, keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("localhost:1", True),
        ("LOCALHOST", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("user@evil.example", False),
        ("localhost@evil.example", False),
        ("[::1", False),
        ("::1", False),
        ("a b", False),
    ],
)
def test_hosts(port: int, host: str, good: bool) -> None:
    answer = ask(port, get("/v1/models", {"Host": host}))
    assert answer.status == (200 if good else 403)
    assert good or answer.code == "host_not_allowed"


def test_no_host_at_all(port: int) -> None:
    assert ask(port, b"GET /v1/models HTTP/1.0\r\n\r\n").code == "host_not_allowed"
    assert ask(port, b"GET /v1/models HTTP/1.1\r\n\r\n").status == 400


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        ("", True),
        ("http://127.0.0.1", True),
        ("https://127.0.0.1", False),
        ("http://localhost", False),
        ("null", False),
        ("http://evil.example", False),
        ("http://127.0.0.1.evil.example", False),
    ],
)
def test_origins(port: int, origin: str, good: bool) -> None:
    answer = ask(port, post(COMPLETIONS, GOOD, {"Origin": origin}))
    assert answer.status == (200 if good else 403)
    assert good or answer.code == "origin_not_allowed"
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_simple_post_of_a_browser_is_refused(port: int) -> None:
    """Pages may send these content types anywhere without asking; none of them is JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = ask(port, post(COMPLETIONS, GOOD, {"Content-Type": kind}))
        assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_an_allowed_origin_gets_cors(client: api.AsyncClient) -> None:
    with serving(None, origins=["https://app.example"], keys=KEYS) as running:
        asked = {"Host": "localhost", "Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        answer = ask(running.port, head("OPTIONS", CHAT, asked))
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        answer = ask(running.port, get("/health", {"Origin": "https://app.example"}))
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert ask(running.port, head("OPTIONS", CHAT, asked | {"Origin": "https://b.example"})).status == 403


@pytest.fixture(scope="module")
def guarded(client: api.AsyncClient) -> Iterator[int]:
    """With keys, and still loading: a good key is seen by the 503 behind it."""
    with serving(None, keys=KEYS) as running:
        yield running.port


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-firs",
        "Bearer sk-firstx",
        "Bearer SK-FIRST",
        "Bearer sk-first sk-second",
        "Basic sk-first",
        "sk-first",
        "Bearer \xfcml\xe4ut",
        "Bearer " + "x" * 4000,
    ],
)
def test_wrong_keys(guarded: int, authorization: str) -> None:
    for path in ("/v1/models", "/metrics", "/tokenize", "/nope", "/health/", "/v1/../health", "/HEALTH"):
        answer = ask(guarded, get(path, {"Authorization": authorization}))
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in answer.body.decode()


def test_right_keys(guarded: int) -> None:
    for authorization in ("Bearer sk-first", "bearer sk-second", "Bearer  sk-second "):
        assert ask(guarded, get("/v1/models", {"Authorization": authorization})).code == "model_loading"
    for path in ("/health", "/"):
        assert ask(guarded, get(path)).status == 200
    assert ask(guarded, get("/ready")).status == 503
    assert ask(guarded, post(COMPLETIONS, b"no json", bearer("sk-first"))).code == "model_loading"


def test_loading_tells_when_to_ask_again(guarded: int) -> None:
    answer = ask(guarded, get("/v1/models", bearer("sk-first")))
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("5", "5000")
    assert answer.json["error"]["type"] == "server_error"


def test_keys_that_are_none() -> None:
    for bad in ("", "two words", "\xfc", "x" * 600, "line\n"):
        with pytest.raises(ValueError, match="API key"):
            Keys([bad])
    with pytest.raises(ValueError, match="at most 1024"):
        Keys(str(i) for i in range(1025))


# --- heads and bodies --------------------------------------------------------------------------------------------


def test_heads_over_the_limit(port: int) -> None:
    many = {f"X-{i}": "a" for i in range(70)}
    for request in (
        get("/health", many),
        get("/health", {"X-Long": "a" * 17_000}),
        get("/health", {"X-Long": "a" * 200_000}),
        get("/" + "a" * 17_000),
    ):
        answer = ask(port, request)
        assert (answer.status, answer.code) == (431, "headers_too_large")


BAD_BODIES: list[bytes] = [
    b"",
    b" ",
    b"{",
    b'{"model": "tiny"',
    b"[]",
    b'"text"',
    b"null",
    b"1",
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": 1e400}',
    b'{"a": -1e400}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": 1, "a": 2}',
    b'{"a": {"b": 1, "b": 1}}',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
    b'{"a": "\xff"}',
    b"\xff\xfe{\x00}\x00",
    b'\xef\xbb\xbf{"a": 1}',
    b"{'a': 1}",
    b'{"a": 1,}',
    b'{"a": 01}',
    b'{"a": "\n"}',
    b'{"a": "\x00"}',
    b'{"a": 1} {"b": 2}',
    b"\x00",
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:20]))
def test_bodies_that_are_not_one_json_object(port: int, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        answer = ask(port, post(path, body))
        assert (answer.status, answer.code) == (400, "invalid_json")


def test_depth_is_counted() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * (depth - 1) + b"[]" + b"}" * (depth - 1)

    assert parse_object(nested(32), 32)
    with pytest.raises(api.BadRequestError, match="32 levels"):
        parse_object(nested(33), 32)
    assert parse_object(b'{"a": [' + b"[]," * 1000 + b"[]]}", 32)


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"', "application/json;x=y"],
)
def test_content_types_that_are_json(port: int, kind: str) -> None:
    assert ask(port, post(COMPLETIONS, GOOD, {"Content-Type": kind})).status == 200


@pytest.mark.parametrize(
    "lines",
    [
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/jsonx"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "br, gzip"},
    ],
)
def test_encodings_that_are_not(port: int, lines: dict[str, str]) -> None:
    answer = ask(port, post(COMPLETIONS, GOOD, lines))
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


def test_missing_fields_are_named(port: int) -> None:
    for path, body, param in (
        (CHAT, {"messages": MESSAGES}, "model"),
        (CHAT, {"messages": MESSAGES, "model": None}, "model"),
        (CHAT, {"model": "tiny"}, "messages"),
        (COMPLETIONS, {"model": "tiny"}, "prompt"),
        ("/detokenize", {}, "tokens"),
    ):
        error = ask(port, post(path, body)).json["error"]
        assert (error["param"], error["code"]) == (param, "missing_required_parameter")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/tokenize", {"prompt": "a" * 100_000}),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}),
        ("/tokenize", {"messages": "hello"}),
        ("/tokenize", {"messages": [{"role": "user"}]}),
        ("/tokenize", {"prompt": "a", "model": ["tiny"]}),
        ("/detokenize", {"tokens": "1"}),
        ("/detokenize", {"tokens": [1, -1]}),
        ("/detokenize", {"tokens": [1, 400]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": {"1": 1}}),
        (CHAT, {"model": "tiny", "messages": MESSAGES, "stop": ["\udfff"]}),
        (COMPLETIONS, {"model": "tiny", "prompt": "\ud800"}),
        (COMPLETIONS, {"model": 7, "prompt": "a"}),
        (COMPLETIONS, {"model": "tiny", "prompt": "a", "timeout": 0, "seed": "x"}),
        (COMPLETIONS, {"model": "tiny", "prompt": "a"} | {f"x{i}": 1 for i in range(200)}),
    ],
    ids=lambda one: str(one)[:50],
)
def test_fields_of_the_wrong_kind(port: int, path: str, body: Any) -> None:
    answer = ask(port, post(path, body))
    assert answer.status == 400
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit(port: int) -> None:
    big = b'{"a": "' + b"x" * (3 << 20) + b'"}'
    answer = ask(port, post(CHAT, big))
    assert (answer.status, answer.code) == (413, "request_too_large")
    chunked = post(CHAT, b"", {"Transfer-Encoding": "chunked", "Content-Length": ""})
    with Raw(port) as raw:
        raw.send(chunked)
        for start in range(0, len(big), 65536):
            part = big[start : start + 65536]
            raw.send(b"%x\r\n%s\r\n" % (len(part), part))
        raw.send(b"0\r\n\r\n")
        assert raw.answer().code == "request_too_large"


def test_a_body_in_too_many_pieces(port: int) -> None:
    with Raw(port) as raw:
        raw.send(post(CHAT, b"", {"Transfer-Encoding": "chunked", "Content-Length": ""}))
        with suppress(OSError, EOFError):  # it may be cut off in the middle
            raw.send(b"6\r\n{     \r\n" * 100_000)
            assert raw.answer().code == "request_too_large"


def test_a_body_that_stops_half_way(port: int) -> None:
    started = time.monotonic()
    with Raw(port) as raw:
        raw.send(post(COMPLETIONS, GOOD)[:-10])
        answer = raw.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert raw.closed()
    assert LIMITS.send <= time.monotonic() - started < LIMITS.send + 4


def test_a_head_that_stops_half_way(port: int) -> None:
    with Raw(port) as raw:
        answer = raw.send(b"POST /v1/comp").answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        assert raw.closed()


def test_a_connection_that_says_nothing(port: int) -> None:
    with Raw(port) as raw:
        assert raw.closed()


def test_a_connection_that_is_idle_after_an_answer(port: int) -> None:
    with Raw(port) as raw:
        assert raw.send(get("/health")).answer().status == 200
        assert raw.closed()


def test_a_head_that_drips(port: int) -> None:
    """Bytes that keep coming do not buy time."""
    started = time.monotonic()
    with Raw(port) as raw, pytest.raises(OSError):
        for byte in get("/health", {"X-Slow": "a" * 1000}):
            raw.send(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - started < LIMITS.send + 4


def test_no_more_connections_than_allowed() -> None:
    """One too many is closed at once; those before it are served, and the next one when there is room."""
    with serving(None, limits=HttpLimits(connections=3)) as running, ExitStack() as stack:
        first, *others = [stack.enter_context(Raw(running.port)) for _ in range(3)]
        for raw in (first, *others):
            assert raw.send(get("/health")).answer().status == 200
        with Raw(running.port) as raw, pytest.raises((EOFError, OSError)):
            raw.send(get("/health")).answer()
        for raw in (first, *others):
            assert raw.send(get("/health")).answer().status == 200
        first.close()
        eventually(lambda: len(running.http.server_state.connections) == 2)
        assert ask(running.port, get("/health")).status == 200


def test_of_a_crowd_of_half_sent_requests_the_oldest_go() -> None:
    """Long before their time is over; the newest are served when they are complete."""
    with serving(None, limits=HttpLimits(unfinished=3, send=60.0)) as running, ExitStack() as stack:
        crowd = [stack.enter_context(Raw(running.port)) for _ in range(8)]
        for raw in crowd:
            raw.send(get("/health")[:-4])
            time.sleep(0.01)
        eventually(lambda: len(running.http.server_state.connections) == 3)
        assert all(raw.closed() for raw in crowd[:5])
        for raw in crowd[5:]:
            assert raw.send(get("/health")[-4:]).answer().status == 200


def test_a_client_that_asks_before_it_sends(port: int) -> None:
    request = post(COMPLETIONS, GOOD, {"Expect": "100-continue"})
    first, _, body = request.partition(b"\r\n\r\n")
    with Raw(port) as raw:
        raw.send(first + b"\r\n\r\n")
        assert raw.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        assert raw.send(body).answer().status == 200
    with Raw(port) as raw:
        answer = raw.send(
            post("/nope", GOOD, {"Expect": "100-continue"}).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        ).answer()
        assert (answer.status, answer.headers["connection"]) == (404, "close")


def test_one_connection_many_requests(port: int) -> None:
    """Good and bad in turn, and two sent at once: each gets its own answer."""
    with Raw(port) as raw:
        for _ in range(3):
            assert raw.send(post(COMPLETIONS, GOOD)).answer().status == 200
            assert raw.send(post(COMPLETIONS, b"{")).answer().status == 400
            assert raw.send(get("/nope")).answer().status == 404
            assert raw.send(post(CHAT, GOOD, {"Content-Type": "text/plain"})).answer().status == 415
        raw.send(post(COMPLETIONS, GOOD) + get("/health"))
        assert raw.answer().json["object"] == "text_completion"
        assert raw.answer().json["status"] == "ok"


def test_a_reply_does_not_wait_for_the_network(port: int) -> None:
    """40 ms a reply is what a delayed acknowledgement costs when small writes are held back."""
    with Raw(port) as raw:
        started = time.monotonic()
        for _ in range(20):
            raw.send(get("/ready")).answer()
        assert (time.monotonic() - started) / 20 < 0.03


def test_an_answer_leaves_in_one_piece(port: int) -> None:
    """Head and body together: whoever has read the head has the body as well."""
    with Raw(port) as raw:
        for request in (get("/health"), post(CHAT, b"{")):
            top = raw.send(request).read_until(b"\r\n\r\n").decode().lower()
            size = re.search(r"content-length: (\d+)", top)
            assert size is not None
            assert len(raw.buffer) == int(size[1]) > 0
            raw.buffer = b""


def test_a_crowd_is_read_in_turn() -> None:
    """A few sockets a round, each once; those that were closed meanwhile, or registered anew, are left out."""
    pairs = [socket.socketpair() for _ in range(2 * AT_ONCE)]
    with ExitStack() as stack, InTurn() as selector:
        for here, there in pairs:
            stack.enter_context(here)
            stack.enter_context(there)
            selector.register(here, EVENT_READ)
            there.send(b"!")
        first = {key.fd for key, _ in selector.select(0)}
        assert len(first) == AT_ONCE
        gone, back, *_ = [here for here, _ in pairs if here.fileno() not in first]
        selector.unregister(gone)
        selector.unregister(back)
        selector.register(back, EVENT_READ, data="another")
        second = {key.fd for key, _ in selector.select(0)}
        assert len(second) == AT_ONCE - 2
        assert not second & (first | {gone.fileno(), back.fileno()})
        again = [key for _ in range(2) for key, _ in selector.select(0)]
        assert len(again) == 2 * AT_ONCE - 1  # nobody has been read yet
        assert [key.data for key in again if key.fd == back.fileno()] == ["another"]


# --- headers and the log -----------------------------------------------------------------------------------------


def test_headers_of_every_answer(port: int) -> None:
    seen = set()
    for request in (get("/health"), get("/nope"), get("/v1/models"), post(CHAT, b"{"), post(COMPLETIONS, GOOD)):
        answer = ask(port, request)
        seen.add(answer.headers["x-request-id"])
        if b" /v1/" in request:
            assert answer.headers["x-ratelimit-limit-requests"] == "30"
            assert answer.headers["x-ratelimit-remaining-requests"] in ("29", "30")
            assert answer.headers["x-ratelimit-reset-requests"] == "0s"
    assert len(seen) == 5
    assert all(len(one) == 43 for one in seen)


def test_the_id_of_the_answer_is_that_of_the_header(port: int) -> None:
    answer = ask(port, post(COMPLETIONS, GOOD, {"X-Request-Id": "mine"}))
    assert answer.json["id"] == f"tiny-{answer.headers['x-request-id']}"
    assert answer.headers["x-client-request-id"] == "mine"


@pytest.mark.parametrize("name", ["x" * 129, "\xfc", "a\tb"])
def test_ids_of_clients_that_are_not_returned(port: int, name: str) -> None:
    assert "x-client-request-id" not in ask(port, get("/health", {"X-Client-Request-Id": name})).headers


def test_ignored_parameters_are_told_in_a_header(port: int) -> None:
    body = GOOD | {"user": "me", "b": 1, "a": 1, "Bad\r\nName": 1, "stream": True}
    answer = ask(port, post(COMPLETIONS, body))
    assert answer.headers["x-ignored-parameters"] == "a,b,user"
    assert answer.events[0]["ignored_parameters"] == ["a", "b", "user"]


def test_the_log_has_no_text_and_no_key(client: api.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    secret = "the-secret-word"
    with caplog.at_level(logging.DEBUG), serving(client, keys=[secret]) as running:
        good = GOOD | {"prompt": f"{secret} {PROMPT}", "user": secret, secret: 1, "logprobs": 1}
        for body in (good, good | {"stream": True}, good | {"n": secret}, good | {"model": secret}):
            ask(running.port, post(COMPLETIONS, body, bearer(secret) | {"X-Request-Id": secret, "X-A": secret}))
        ask(running.port, post(f"/{secret}", good, bearer(secret)))
        ask(running.port, get(f"/v1/models/{secret}", bearer(secret + "x")))
        eventually(lambda: len(lines_of(caplog)) == 6)
        assert secret not in caplog.text
        first, second, third, *_ = lines_of(caplog)
    assert (first["endpoint"], first["status"], first["outcome"]) == ("completions", 200, "ok")
    assert first["completion_tokens"] == 3
    assert first["key"] == second["key"]
    assert len(first["key"]) == 8
    assert second["stream"] is True
    assert second["ms"] >= second["first_token_ms"] > 0
    assert (third["outcome"], third["code"]) == ("invalid", "invalid_type")


def lines_of(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "api.access"]


def test_two_keys_share_no_cached_prompt(client: api.AsyncClient) -> None:
    with serving(client, keys=KEYS) as running:
        long = GOOD | {"prompt": PROMPT * 6}

        def cached(key: str) -> int:
            answer = ask(running.port, post(COMPLETIONS, long, bearer(key)))
            return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached(key) for key in ("sk-first", "sk-second")] == [0, 0]
        assert cached("sk-first") == cached("sk-second") > 0


# --- metrics -----------------------------------------------------------------------------------------------------


def test_metrics(client: api.AsyncClient) -> None:
    with serving(client) as running:
        for body in (GOOD, GOOD | {"stream": True}, GOOD | {"n": 0}):
            ask(running.port, post(COMPLETIONS, body))
        ask(running.port, get("/made-up-by-a-stranger"))
        eventually(lambda: running.app.active == 0)
        text = ask(running.port, get("/metrics")).body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['llama_requests_total{endpoint="completions",outcome="ok"}'] == "2.0"
    assert values['llama_requests_total{endpoint="completions",outcome="invalid"}'] == "1.0"
    assert values['llama_requests_total{endpoint="other",outcome="invalid"}'] == "1.0"
    assert values["llama_time_to_first_token_seconds_count"] == "2.0"
    assert values["llama_request_generation_tokens_sum"] == "6.0"
    assert values['llama_slots_limit{model_name="tiny"}'] == "30.0"
    assert "stranger" not in text
    for name in METRICS:
        assert f"# TYPE llama_{name} " in text, name


METRICS = re.findall(
    r"\w+",
    """num_requests_running num_requests_waiting kv_cache_usage_perc slots_in_use slots_limit
    step_heartbeat_age_seconds prompt_tokens_total generation_tokens_total prefix_cache_queries_total
    prefix_cache_hits_total num_preemptions_total admission_rejections_total requests_total
    time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds
    request_prompt_tokens request_generation_tokens build_info""",
)


# --- errors as openai's client sees them -------------------------------------------------------------------------


def test_the_client_raises_the_right_errors(served: Serving, guarded: int) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="'n' is 0") as caught:
            client.completions.create(model="tiny", prompt="a", n=0)
        assert caught.value.param == "n"
        assert caught.value.request_id
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")
    for key, kind in (("x", openai.AuthenticationError), (KEYS[0], openai.InternalServerError)):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{guarded}/v1", api_key=key, max_retries=0)
        with client, pytest.raises(kind):
            client.models.list()


# --- when to come back -------------------------------------------------------------------------------------------


def test_those_who_are_refused_are_spread() -> None:
    now = [100.0]
    retry_after = RetryAfter(lambda: now[0])

    def until_free(rank: int) -> float:  # three slots, each free every two seconds
        return 2.0 * (1 + rank // 3)

    assert [round(retry_after.seconds(until_free), 2) for _ in range(7)] == [2.25, 2.25, 2.25, 4.45, 4.45, 4.45, 6.65]
    now[0] += 2.5
    assert round(retry_after.seconds(until_free), 2) == 4.45  # four are still away
    assert max(retry_after.seconds(until_free) for _ in range(5000)) == 60
    now[0] += 60
    assert round(retry_after.seconds(until_free), 2) == 2.25
