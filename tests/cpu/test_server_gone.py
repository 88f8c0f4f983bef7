"""Clients that go, stall or crowd, requests that fail half way, and the end of the server: nothing is lost or left."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from api_cases import MESSAGES, PROMPT, Script, idle, scripted, write_model
from server_cases import Answer, Raw, Serving, ask, eventually, get, post, serving

import api
from api.http.limits import HttpLimits
from api.http.middleware import access_log
from api.http.uvicorn_server import Exit

SLOTS = 6
LIMITS = HttpLimits(send=2.0, stalled=0.5, drain=1.0, quiet=0.3, queue=0.5, request=3.0)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SHORT = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "seed": 1}
# The soak and the number of disconnects: a short form by default, the long one by LLAMA_LONG=1.
LONG_FORM = bool(os.environ.get("LLAMA_LONG"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def client(folder: Path) -> api.AsyncClient:
    return api.AsyncClient(folder, block_size=16, slots=SLOTS)


@pytest.fixture(scope="module")
def served(client: api.AsyncClient) -> Iterator[Serving]:
    with serving(client, slots=SLOTS, limits=LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left_behind(client: api.AsyncClient, served: Serving) -> Iterator[None]:
    yield
    eventually(lambda: served.app.active == 0 and idle(client))
    assert ask(served.port, post(COMPLETIONS, SHORT)).status == 200
    eventually(served.at_rest)


@pytest.fixture
def slow(client: api.AsyncClient) -> Iterator[Script]:
    """Steps of 10 ms, so that what was started is still running when the next line looks."""
    with scripted(client, lambda index, prompt: [300] * 230) as script:
        script.gate = lambda: time.sleep(0.01)
        yield script
        eventually(lambda: idle(client))


def in_use(client: api.AsyncClient) -> int:
    return client.stats().slots_in_use


# --- clients that go ---------------------------------------------------------------------------------------------

REQUEST = post(COMPLETIONS, LONG)
STREAM = post(COMPLETIONS, LONG | {"stream": True})


def begun(raw: Raw, client: api.AsyncClient) -> None:
    raw.send(REQUEST)
    eventually(lambda: client.stats().running > 0)


def streaming(raw: Raw, client: api.AsyncClient) -> None:
    raw.send(STREAM).read_until(b"data: ")


def far_into_it(raw: Raw, client: api.AsyncClient) -> None:
    streaming(raw, client)
    for _ in range(5):
        raw.read_until(b"data: ")


def pipelined(raw: Raw, client: api.AsyncClient) -> None:
    raw.send(STREAM + STREAM).read_until(b"data: ")


STAGES: dict[str, Callable[[Raw, api.AsyncClient], object]] = {
    "connected": lambda raw, client: None,
    "in the first line": lambda raw, client: raw.send(b"POST /v1/com"),
    "in the head": lambda raw, client: raw.send(REQUEST[:60]),
    "before the body": lambda raw, client: raw.send(REQUEST.partition(b"{")[0]),
    "in the body": lambda raw, client: raw.send(REQUEST[:-5]),
    "just sent": lambda raw, client: raw.send(REQUEST),
    "just sent, to be streamed": lambda raw, client: raw.send(STREAM),
    "running": begun,
    "first event": streaming,
    "far into it": far_into_it,
    "two requests at once": pipelined,
    "n choices": lambda raw, client: raw.send(post(COMPLETIONS, LONG | {"stream": True, "n": 4})).read_until(b"data: "),
}


def fin(raw: Raw) -> None:
    raw.close()


def half(raw: Raw) -> None:
    raw.socket.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [fin, half, Raw.reset], ids=lambda leave: leave.__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_goes_is_noticed(
    client: api.AsyncClient, served: Serving, slow: Script, stage: str, leave: Callable[[Raw], None]
) -> None:
    with Raw(served.port) as raw:
        STAGES[stage](raw, client)
        leave(raw)
        took = eventually(lambda: served.app.active == 0 and idle(client))
    assert took < 0.25 + 0.1  # the second figure for a busy machine


@pytest.mark.slow
def test_many_that_go_leave_nothing(client: api.AsyncClient, served: Serving, slow: Script) -> None:
    """Disconnects at all stages, all ways, several at a time, beside a client that stays."""
    rng, count = random.Random(7), 1000 if LONG_FORM else 120
    eventually(served.at_rest)
    before = resources()

    def leave(_: int) -> None:
        stage, way = rng.choice(list(STAGES)), rng.choice([fin, half, Raw.reset])
        with Raw(served.port) as raw:
            try:
                STAGES[stage](raw, client)
            except (EOFError, AssertionError):
                return  # refused: no slot
            time.sleep(rng.random() * 0.02)
            way(raw)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(count)))
    eventually(lambda: idle(client))
    eventually(served.at_rest)
    eventually(lambda: resources() == before)


def resources() -> tuple[int, set[str]]:
    """Open files, and threads."""
    return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()} - workers()


def workers() -> set[str]:
    """Threads that pools keep for later."""
    return {thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name or "asyncio_" in thread.name}


def test_a_reader_that_does_not_read_is_cut_off(client: api.AsyncClient, served: Serving) -> None:
    """Five of them, far more text than the sockets hold, and a good client beside them."""
    body = LONG | {"stream": True, "n": 8, "logprobs": 5, "return_token_ids": True, "max_tokens": 230}
    with (
        ExitStack() as stuck,
        listening() as log,
        scripted(client, lambda index, prompt: [300] * 230) as script,
    ):
        script.gate = lambda: time.sleep(0.005)  # many small writes: one large one would be out of the server's hands
        for _ in range(SLOTS - 1):
            raw = stuck.enter_context(Raw(served.port))
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.send(post(COMPLETIONS, body))
        for _ in range(5):
            assert ask(served.port, post(COMPLETIONS, SHORT)).status == 200
        eventually(lambda: idle(client))
        eventually(served.at_rest)
        assert log.outcomes == {"ok": 5, "stalled": SLOTS - 1}


# --- slots -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
def test_one_more_than_the_slots_is_refused(client: api.AsyncClient, served: Serving) -> None:
    with ExitStack() as stack:
        for _ in range(SLOTS):
            stack.enter_context(Raw(served.port)).send(STREAM)
        eventually(lambda: in_use(client) == SLOTS)
        for path, body in ((COMPLETIONS, SHORT), (CHAT, {"model": "tiny", "messages": MESSAGES, "stream": True})):
            answer = ask(served.port, post(path, body))
            assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
            assert answer.json["error"]["type"] == "requests"
            check_retry(answer)
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert answer.headers["x-ratelimit-reset-requests"] != "0s"
        assert ask(served.port, post(COMPLETIONS, SHORT | {"n": 0})).status == 400  # fields come before the slot
        assert ask(served.port, get("/v1/models")).status == 200
        assert ask(served.port, post("/tokenize", {"prompt": "a"})).status == 200


def check_retry(answer: Answer) -> None:
    seconds, ms = int(answer.headers["retry-after"]), int(answer.headers["retry-after-ms"])
    assert 1 <= seconds <= 60
    assert 0 < ms <= 1000 * seconds


@pytest.mark.usefixtures("slow")
def test_slots_of_a_key(client: api.AsyncClient) -> None:
    with serving(client, keys=["one", "two"], slots_per_key=2, limits=LIMITS) as running:

        def headers(key: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {key}"}

        streams = [Raw(running.port).send(post(COMPLETIONS, LONG | {"stream": True}, headers("one"))) for _ in range(2)]
        eventually(lambda: in_use(client) == 2)
        refused = ask(running.port, post(COMPLETIONS, SHORT, headers("one")))
        assert (refused.status, refused.headers["x-ratelimit-limit-requests"]) == (429, "2")
        assert ask(running.port, post(COMPLETIONS, SHORT, headers("two"))).status == 200
        text = ask(running.port, get("/metrics", headers("one"))).body
        assert b'llama_admission_rejections_total{reason="key"} 1.0' in text
        for raw in streams:
            raw.close()
        eventually(lambda: running.app.active == 0)


@pytest.mark.usefixtures("slow")
def test_slots_in_all(client: api.AsyncClient) -> None:
    """Two keys that have slots left each, and the model none: a refusal at once, and no waiting."""
    with serving(client, keys=["one", "two"], slots_per_key=SLOTS, limits=HttpLimits()) as running:
        streams = []
        for number in range(SLOTS):
            headers = {"Authorization": f"Bearer {('one', 'two')[number % 2]}"}
            streams.append(Raw(running.port).send(post(COMPLETIONS, LONG | {"stream": True}, headers)))
        eventually(lambda: in_use(client) == SLOTS)
        for _ in range(2):
            refused = ask(running.port, post(COMPLETIONS, SHORT, headers))
            assert (refused.status, refused.headers["x-ratelimit-remaining-requests"]) == (429, "0")
            assert in_use(client) == SLOTS, "it waited until a slot was free"
            check_retry(refused)
        text = ask(running.port, get("/metrics", headers)).body
        assert b'llama_admission_rejections_total{reason="slots"} 2.0' in text
        for raw in streams:
            raw.close()
        eventually(lambda: running.app.active == 0)


@pytest.fixture(scope="module")
def crowded(folder: Path) -> Iterator[tuple[api.AsyncClient, Serving]]:
    """A server with the usual thirty slots. It lets a thousand connect before the first one speaks, however long that
    takes here; as a rule, those who connect and say nothing are a crowd of which the oldest go."""
    with api_client(folder) as client, serving(client, slots=30, limits=HttpLimits(unfinished=2000)) as running:
        yield client, running


@contextmanager
def api_client(folder: Path) -> Iterator[api.AsyncClient]:
    client = api.AsyncClient(folder, block_size=16, slots=30)
    yield client
    asyncio.run(client.close())


def test_a_thousand_sockets_on_thirty_slots(crowded: tuple[api.AsyncClient, Serving]) -> None:
    """Never more in flight than slots; every request answered, refusals at once and with a time to come back."""
    (client, served), count, seen, took = crowded, 1000, [], []

    async def one(start: asyncio.Event) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        await start.wait()
        began = time.monotonic()
        writer.write(post(COMPLETIONS, LONG | {"max_tokens": 100}, {"Connection": "close"}))
        data = await reader.read(-1)
        writer.close()
        top, _, body = data.partition(b"\r\n\r\n")
        lines = top.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        answer = Answer(int(lines[0].split()[1]), headers, body)
        if answer.status == 429:
            took.append(time.monotonic() - began)
        return answer

    async def all_of_them() -> list[Answer]:
        start = asyncio.Event()
        tasks = [asyncio.create_task(one(start)) for _ in range(count)]
        await asyncio.sleep(0.5)
        start.set()
        return await asyncio.gather(*tasks)

    with scripted(client, lambda index, prompt: [300] * 230) as script:
        script.gate = lambda: (seen.append(in_use(client)), time.sleep(0.01))
        answers = asyncio.run(all_of_them())
    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 30
    assert max(seen) <= 30
    for answer in answers:
        if answer.status == 429:
            check_retry(answer)
        else:
            assert answer.json["usage"]["completion_tokens"] == 100
    p50, p99 = (sorted(took)[int(len(took) * share)] * 1000 for share in (0.5, 0.99))
    print(f"refusals of {count} at once: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def test_twice_as_many_stock_clients_as_slots_all_finish(crowded: tuple[api.AsyncClient, Serving]) -> None:
    """Sixty on thirty. They retry twice, when they are told to."""
    client, served = crowded

    async def one(remote: openai.AsyncOpenAI) -> str:
        answer = await remote.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, extra_body={"ignore_eos": True}
        )
        return str(answer.choices[0].finish_reason)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as remote:
            return await asyncio.gather(*[one(remote) for _ in range(60)])

    with scripted(client, lambda index, prompt: [300] * 230) as script:
        script.gate = lambda: time.sleep(0.01)
        reasons = asyncio.run(all_of_them())
    assert reasons == ["length"] * 60


# --- what fails half way -----------------------------------------------------------------------------------------


class Failing(Script):
    """Yields so many tokens, then raises."""

    def __init__(self, after: int) -> None:
        super().__init__(lambda index, prompt: [300] * 230)
        self.after = after

    def launch(self, plan: Any) -> Any:
        if any(seq.n_generated >= self.after for seq in plan.seqs):
            raise RuntimeError("planted")
        return super().launch(plan)


@contextmanager
def failing(client: api.AsyncClient, after: int) -> Iterator[None]:
    loop = client.served.find().engine._loop
    runner, loop.runner = loop.runner, Failing(after)
    try:
        yield
    finally:
        loop.runner = runner


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_step_that_fails(client: api.AsyncClient, served: Serving, stream: bool, after: int) -> None:
    """Before the first token: a status. Later: one event with the error, and no [DONE]."""
    with failing(client, after):
        answer = ask(served.port, post(COMPLETIONS, LONG | {"stream": stream}))
    if stream and after:
        assert answer.status == 200
        *events, last = answer.events
        assert last["error"]["code"] == "internal_error"
        assert "".join(event["choices"][0]["text"] for event in events)
        assert not any("error" in event for event in events)
    else:
        assert (answer.status, answer.code) == (500, "internal_error")
        assert answer.headers["x-should-retry"] == "false"
    assert "planted" not in answer.body.decode()


def test_openai_raises_what_came_after_the_status(client: api.AsyncClient, served: Serving) -> None:
    with (
        failing(client, after=4),
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as remote,
        remote.completions.create(model="tiny", prompt=PROMPT, max_tokens=50, stream=True) as stream,
        pytest.raises(openai.APIError, match="failed while it ran"),
    ):
        list(stream)


@pytest.mark.usefixtures("slow")
def test_the_deadline_of_a_request(client: api.AsyncClient) -> None:
    with serving(client, limits=HttpLimits(request=0.3)) as running:
        answer = ask(running.port, post(COMPLETIONS, LONG))
        assert (answer.status, answer.code) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        events = ask(running.port, post(COMPLETIONS, LONG | {"stream": True})).events
        assert events[-1]["error"]["code"] == "deadline_exceeded"


def test_a_request_that_waits_too_long_for_its_turn(client: api.AsyncClient, served: Serving, slow: Script) -> None:
    slow.gate = lambda: time.sleep(1.0)
    started = time.monotonic()
    answer = ask(served.port, post(COMPLETIONS, LONG))
    assert (answer.status, answer.code) == (503, "queue_timeout")
    assert "retry-after" in answer.headers
    assert time.monotonic() - started < 0.9
    slow.gate = None


def test_pauses_are_filled_with_comments(client: api.AsyncClient, served: Serving, slow: Script) -> None:
    slow.gate = lambda: time.sleep(0.5 if slow.n_steps == 3 else 0.0)
    answer = ask(served.port, post(COMPLETIONS, LONG | {"stream": True, "max_tokens": 6}))
    assert b"\n\n: still here\n\ndata: " in answer.body
    assert answer.events[-1] == "[DONE]"


def test_health_says_when_steps_have_stopped(client: api.AsyncClient, served: Serving, slow: Script) -> None:
    go_on = threading.Event()
    slow.gate = go_on.wait
    try:
        with Raw(served.port) as raw:
            raw.send(STREAM)
            took = eventually(lambda: ask(served.port, get("/health")).status == 503)
            assert 1.5 < took < 3.0
            assert ask(served.port, get("/ready")).status == 503
    finally:
        slow.gate = None
        go_on.set()
    eventually(lambda: ask(served.port, get("/health")).status == 200)


# --- the end -----------------------------------------------------------------------------------------------------


def ending(folder: Path, **limits: float) -> Any:
    return serving(api.AsyncClient(folder, block_size=16), limits=HttpLimits(**limits))


def test_an_engine_that_dies_ends_the_server(folder: Path) -> None:
    with ending(folder) as running:
        client = running.app.client
        with scripted(client, lambda index, prompt: [300] * 230) as script:

            def lose() -> None:
                raise RuntimeError("CUDA error: planted")

            script.gate = lambda: time.sleep(0.01)
            with Raw(running.port) as raw:
                raw.send(STREAM).read_until(b"data: ")
                script.gate = lose
                text = raw.read_until(b"\r\n0\r\n\r\n")
        assert b'"engine_failed"' in text
        running.thread.join(timeout=5)
        assert not running.thread.is_alive()
    assert running.http.exit_code == Exit.ENGINE_FAILED


def test_the_first_signal_lets_running_requests_finish(folder: Path) -> None:
    with ending(folder) as running:
        with scripted(running.app.client, lambda index, prompt: [300] * 230) as script:
            script.gate = lambda: time.sleep(0.01)
            with Raw(running.port) as raw, Raw(running.port) as other:
                raw.send(STREAM).read_until(b"data: ")
                running.http.stop()
                eventually(lambda: running.app.draining)
                assert other.send(post(COMPLETIONS, SHORT)).answer().code == "shutting_down"
                ready = ask(running.port, get("/ready"))
                assert (ready.status, ready.code) == (503, "shutting_down")
                assert ask(running.port, get("/health")).status == 200
                assert b"[DONE]" in raw.read_until(b"\r\n0\r\n\r\n")
            running.thread.join(timeout=5)
        assert not running.thread.is_alive()
    assert running.http.exit_code == Exit.DONE


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_finish_is_cut_off_with_an_error(folder: Path, signals: int) -> None:
    with ending(folder, drain=0.3 if signals == 1 else 30.0) as running:
        with scripted(running.app.client, lambda index, prompt: [300] * 230) as script:
            script.gate = lambda: time.sleep(0.05)
            with Raw(running.port) as raw, Raw(running.port) as whole:
                whole.send(REQUEST)
                raw.send(STREAM).read_until(b"data: ")
                for _ in range(signals):
                    running.http.stop()
                text = raw.read_until(b"\r\n0\r\n\r\n")
                assert b'"shutting_down"' in text
                assert b"[DONE]" not in text
                assert whole.answer().code == "shutting_down"
            running.thread.join(timeout=5)
        assert not running.thread.is_alive()
    assert running.http.exit_code == Exit.ABORTED


# --- soak --------------------------------------------------------------------------------------------------------


def test_soak(client: api.AsyncClient, served: Serving) -> None:
    """Half streamed, a tenth given up, a twentieth bad: every request has one end, and nothing grows.

    The ends are counted on both sides: what came over the wire, and what the server's log says of each request.
    """
    rng, count = random.Random(11), 20_000 if LONG_FORM else 400
    ends: Counter[str] = Counter()
    eventually(served.at_rest)
    before = resources()
    memory: list[int] = []
    took: list[float] = []

    def one(number: int) -> None:
        stream, dice = rng.random() < 0.5, rng.random()
        body = SHORT | {"stream": stream, "max_tokens": rng.randint(1, 12), "seed": number}
        if dice < 0.05:
            body["temperature"] = "hot"
        with Raw(served.port) as raw:
            began = time.monotonic()
            raw.send(post(COMPLETIONS, body))
            if 0.05 <= dice < 0.15:
                time.sleep(rng.random() * 0.01)
                ends["given up"] += 1
                return
            answer = raw.answer()
            took.append(time.monotonic() - began)
        ends[str(answer.status)] += 1
        if answer.status == 200 and stream:
            assert answer.events[-1] == "[DONE]"
        elif answer.status == 200:
            assert answer.json["choices"][0]["finish_reason"] in ("stop", "length")
        else:
            assert answer.status == (400 if dice < 0.05 else 429)
        if number % 100 == 99:
            memory.append(resident())

    numbers = iter(range(count))  # and no future for each: thousands of them make a garbage collection last 0.2 s

    def one_after_the_other(_: int) -> None:
        for number in numbers:
            one(number)

    with listening() as log, ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(one_after_the_other, range(SLOTS)))
        eventually(lambda: idle(client))
        eventually(served.at_rest)
    assert sum(ends.values()) == count
    assert count - ends["given up"] <= len(log.ids) == log.lines <= count
    assert set(log.outcomes) <= {"ok", "invalid", "refused", "gone"}
    for status, outcome in (("200", "ok"), ("400", "invalid"), ("429", "refused")):
        # Some of those given up were answered before the server knew.
        assert ends[status] <= log.outcomes[outcome] <= ends[status] + ends["given up"]
    eventually(lambda: resources() == before)
    assert memory[-1] - memory[0] < 16 << 20
    p50, p99 = (sorted(took)[int(len(took) * share)] * 1000 for share in (0.5, 0.99))
    print(dict(ends), dict(log.outcomes), f"{memory[0] >> 20} to {memory[-1] >> 20} MiB")
    print(f"an answer took p50 {p50:.1f} ms, p99 {p99:.1f} ms")


@pytest.mark.slow
def test_soak_of_stock_clients(crowded: tuple[api.AsyncClient, Serving]) -> None:
    """The same with sixty openai clients on thirty slots, each with its next request as soon as the last one has its
    end; they come back when they are told to, ten times at most."""
    (client, served), clients, seen = crowded, 60, []
    rng, count = random.Random(12), 20_000 if LONG_FORM else 360
    ends: Counter[str] = Counter()
    memory: list[int] = []

    async def one(remote: openai.AsyncOpenAI, number: int) -> str:
        stream, dice = rng.random() < 0.5, rng.random()
        fields: dict[str, Any] = SHORT | {"max_tokens": rng.randint(1, 40), "seed": number}
        if dice < 0.05:
            fields["temperature"] = -1
        seconds = rng.random() * 0.05 if 0.05 <= dice < 0.15 else None
        try:
            async with asyncio.timeout(seconds):
                answer = await remote.completions.create(**fields, stream=stream)
                if not stream:
                    return str(answer.choices[0].finish_reason)
                return [chunk.choices[0].finish_reason async for chunk in answer][-1]
        except TimeoutError:
            return "given up"
        except (openai.BadRequestError, openai.RateLimitError) as error:
            return str(error.status_code)

    async def one_after_the_other(numbers: Iterator[int]) -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=10) as remote:
            for number in numbers:
                ends[await one(remote, number)] += 1
                if number % 60 == 0:
                    memory.append(resident())

    async def all_of_them() -> None:
        numbers = iter(range(count))
        await asyncio.gather(*[one_after_the_other(numbers) for _ in range(clients)])

    eventually(served.at_rest)
    before_files, before_threads = resources()
    with listening() as log, scripted(client, lambda index, prompt: [300] * 230) as script:
        script.gate = lambda: (seen.append(in_use(client)), time.sleep(0.002))
        asyncio.run(all_of_them())
        eventually(lambda: idle(client))
        eventually(served.at_rest)
    assert sum(ends.values()) == count
    assert set(ends) <= {"stop", "length", "given up", "400", "429"}
    assert ends["429"] <= count // 100
    assert len(log.ids) == log.lines
    assert set(log.outcomes) <= {"ok", "invalid", "refused", "gone"}
    served_well = ends["stop"] + ends["length"]
    assert served_well <= log.outcomes["ok"] <= served_well + ends["given up"]
    assert ends["400"] == log.outcomes["invalid"]
    assert max(seen) == 30
    files, threads = resources()
    assert files <= before_files  # fewer, when a connection of the test before was still closing
    assert threads == before_threads
    warm = len(memory) // 5  # sixty clients have come up by then
    assert memory[-1] - memory[warm] < 16 << 20
    print(dict(ends), dict(log.outcomes), f"{memory[warm] >> 20} to {memory[-1] >> 20} MiB")


class Listener(logging.Handler):
    """Counts the lines of the access log; keeps little, since the memory is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = 0
        self.ids: set[str] = set()
        self.outcomes: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        line = json.loads(record.getMessage())
        self.lines += 1
        self.ids.add(line["id"])
        self.outcomes[line["outcome"]] += 1


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener on the access log, which goes nowhere else meanwhile."""
    listener = Listener()
    access_log.addHandler(listener)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
    try:
        yield listener
    finally:
        access_log.propagate = True
        access_log.setLevel(logging.NOTSET)
        access_log.removeHandler(listener)


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
