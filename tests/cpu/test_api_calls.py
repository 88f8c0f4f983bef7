"""Calls from threads and tasks: slots, waits, timeouts, cancellations, closing; and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from api_cases import MESSAGES, PROMPT, error_of, idle, scripted, write_model

import api
from llama.errors import EngineDead

SLOTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[api.Client]:
    with api.Client(folder, block_size=16, slots=SLOTS) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left_behind(client: api.Client) -> Iterator[None]:
    yield
    eventually(lambda: idle(client))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def complete(client: api.Client, **fields: Any) -> Any:
    return client.completions.create(**{"prompt": PROMPT, "max_tokens": 8, **fields})


def endless(client: api.Client, **fields: Any) -> Any:
    """A stream that holds its slot until it is closed."""
    return complete(client, stream=True, max_tokens=230, ignore_eos=True, **fields)


def fill(client: api.Client) -> list[Any]:
    return [endless(client) for _ in range(SLOTS)]


@pytest.fixture
def slow(client: api.Client) -> Iterator[None]:
    """Steps of 10 ms, so that what was started is still running when the next line looks."""
    with scripted(client, lambda index, prompt: [70] * 230) as script:
        script.gate = lambda: time.sleep(0.01)
        yield
        eventually(lambda: idle(client))


# --- slots -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
def test_one_more_than_the_slots_is_refused_at_once(client: api.Client) -> None:
    streams = fill(client)
    before = client.stats()
    started = time.monotonic()
    for create in (client.completions.create, client.chat.completions.create):
        fields = {"prompt": PROMPT} if create == client.completions.create else {"messages": MESSAGES}
        error = error_of(create, **fields)
        assert (error.status_code, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
        assert isinstance(error, api.RateLimitError)
        assert 0 < error.retry_after < 60
    assert time.monotonic() - started < 1, "a stream takes two seconds"
    assert client.stats().waiting == before.waiting == 0
    streams.pop().close()
    streams.append(endless(client))
    assert client.stats().slots_in_use == SLOTS
    for stream in streams:
        stream.close()
        stream.close()
    assert client.stats().slots_in_use == 0


def test_thirty_slots_unless_said_otherwise(folder: Path) -> None:
    with api.Client(folder) as client, scripted(client, lambda index, prompt: [70] * 230) as script:
        script.gate = lambda: time.sleep(0.01)
        streams = [endless(client) for _ in range(30)]
        assert isinstance(error_of(complete, client), api.RateLimitError)
        assert client.stats().slots_in_use == 30
        del streams
        eventually(lambda: idle(client))


@pytest.mark.usefixtures("slow")
def test_waiting_for_a_slot(client: api.Client) -> None:
    streams = fill(client)
    started = time.monotonic()
    assert isinstance(error_of(complete, client, wait=0.05), api.RateLimitError)
    assert 0.04 < time.monotonic() - started < 1
    timer = threading.Timer(0.05, streams[0].close)
    timer.start()
    assert complete(client, wait=10, max_tokens=1).choices
    timer.join()

    async def in_line() -> None:
        waiting = asyncio.create_task(client.completions.acreate(prompt=PROMPT, max_tokens=1, wait=True))
        streams.append(endless(client))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        cancelled = asyncio.create_task(client.completions.acreate(prompt=PROMPT, wait=True))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        streams.pop().close()
        assert (await waiting).choices

    asyncio.run(in_line())
    for stream in streams:
        stream.close()


@pytest.mark.usefixtures("slow")
def test_a_clients_own_wait(folder: Path) -> None:
    with api.Client(folder, slots=1, wait=5) as waiting:
        stream = endless(waiting)
        threading.Timer(0.05, stream.close).start()
        assert complete(waiting, max_tokens=1).choices
        stream = endless(waiting)
        assert isinstance(error_of(complete, waiting, wait=False), api.RateLimitError)
        stream.close()


@pytest.mark.parametrize("name", ["wait", "timeout"])
@pytest.mark.parametrize("value", ["1", -1, float("nan"), float("inf"), [], 10**400])
def test_bad_waits(client: api.Client, name: str, value: Any) -> None:
    assert error_of(complete, client, **{name: value}).param == name


@pytest.mark.usefixtures("slow")
def test_a_dropped_stream_gives_its_slot_back(client: api.Client) -> None:
    """Never started, started, and from an event loop."""
    streams = fill(client)
    next(streams[1])
    del streams
    gc.collect()
    assert client.stats().slots_in_use == 0

    async def drop() -> None:
        stream = await client.chat.completions.acreate(messages=MESSAGES, stream=True)
        await anext(stream)
        assert client.stats().slots_in_use == 1

    asyncio.run(drop())
    gc.collect()
    assert client.stats().slots_in_use == 0


@pytest.mark.usefixtures("slow")
def test_ways_to_end_a_stream(client: api.Client) -> None:
    with endless(client) as stream:
        next(stream)
    assert client.stats().slots_in_use == 0
    assert list(stream) == []
    stream = endless(client)
    stream.cancel()
    assert client.stats().slots_in_use == 0

    async def ends() -> None:
        async with await client.completions.acreate(prompt=PROMPT, stream=True, max_tokens=200) as stream:
            await anext(stream)
        assert client.stats().slots_in_use == 0
        for end in ("close", "aclose", "cancel"):
            stream = await client.completions.acreate(prompt=PROMPT, stream=True, max_tokens=200)
            await getattr(stream, end)()
            assert client.stats().slots_in_use == 0
            assert [chunk async for chunk in stream] == []

    asyncio.run(ends())


@pytest.mark.usefixtures("slow")
def test_a_cancelled_task_ends_its_request(client: api.Client) -> None:
    async def main() -> None:
        whole = asyncio.create_task(client.completions.acreate(prompt=PROMPT, max_tokens=200))

        async def read() -> None:
            async for _ in await client.completions.acreate(prompt=PROMPT, max_tokens=200, stream=True):
                pass

        streamed = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        assert client.stats().slots_in_use == 2
        for task in (whole, streamed):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert client.stats().slots_in_use == 0

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
def test_timeout(client: api.Client) -> None:
    for fields in ({}, {"stream": True}):
        started = time.monotonic()
        with pytest.raises(api.APITimeoutError) as caught:
            list(complete(client, max_tokens=200, timeout=0.1, **fields))
        assert 0.09 < time.monotonic() - started < 1
        assert (caught.value.status_code, caught.value.code) == (None, None)

    async def main() -> None:
        with pytest.raises(api.error.Timeout):
            await client.completions.acreate(prompt=PROMPT, max_tokens=200, timeout=0.1)
        with pytest.raises(api.APITimeoutError):
            async for _ in await client.completions.acreate(prompt=PROMPT, max_tokens=200, timeout=0.1, stream=True):
                pass

    asyncio.run(main())
    assert complete(client, max_tokens=2, timeout=30).choices
    streams = fill(client)
    with pytest.raises(api.APITimeoutError):
        complete(client, wait=True, timeout=0.05)
    assert isinstance(error_of(complete, client, timeout=0.05), api.RateLimitError)
    for stream in streams:
        stream.close()


# --- everything at once ------------------------------------------------------------------------------------------


def test_64_threads_and_64_tasks_with_cancellations(client: api.Client) -> None:
    """Every request ends once: an answer, a cancellation, a close, or an error that was asked for. Nothing is left."""
    outcomes: list[str] = []
    threads_before = threading.active_count()
    reference = [complete(client, seed=seed, temperature=1).choices[0].text for seed in range(4)]

    def one(kind: int, seed: int) -> str:
        fields: dict[str, Any] = {"seed": seed, "temperature": 1, "wait": True}
        if kind == 0:
            assert complete(client, **fields).choices[0].text == reference[seed]
            return "whole"
        if kind == 1:
            chunks = list(complete(client, stream=True, **fields))
            assert "".join(chunk.choices[0].text for chunk in chunks) == reference[seed]
            return "streamed"
        if kind == 2:
            stream = complete(client, stream=True, **{**fields, "max_tokens": 200, "ignore_eos": True})
            next(stream)
            stream.close()
            return "closed"
        if kind == 3:
            complete(client, stream=True, **fields)  # dropped, never started
            return "dropped"
        return type(error_of(complete, client, n=99)).__name__

    def thread(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(3):
            outcomes.append(one(rng.randrange(5), rng.randrange(4)))

    async def task(seed: int) -> None:
        rng = random.Random(1000 + seed)
        for _ in range(3):
            kind, seed = rng.randrange(4), rng.randrange(4)
            fields: dict[str, Any] = {"prompt": PROMPT, "seed": seed, "temperature": 1, "wait": True, "max_tokens": 8}
            if kind == 0:
                answer = await client.completions.acreate(**fields)
                assert answer.choices[0].text == reference[seed]
                outcomes.append("whole")
            elif kind == 1:
                stream = await client.completions.acreate(**fields, stream=True)
                assert "".join([chunk.choices[0].text async for chunk in stream]) == reference[seed]
                outcomes.append("streamed")
            elif kind == 2:
                long = asyncio.create_task(client.completions.acreate(**{**fields, "max_tokens": 200}))
                await asyncio.sleep(rng.random() / 50)
                long.cancel()
                results = await asyncio.gather(long, return_exceptions=True)
                outcomes.append("cancelled" if isinstance(results[0], asyncio.CancelledError) else "whole")
            else:
                await client.completions.acreate(**fields, stream=True)
                outcomes.append("dropped")

    async def tasks() -> None:
        await asyncio.gather(*(task(i) for i in range(64)))

    threads = [threading.Thread(target=thread, args=(i,)) for i in range(64)]
    threads.append(threading.Thread(target=lambda: asyncio.run(tasks())))
    for one_thread in threads:
        one_thread.start()
    for one_thread in threads:
        one_thread.join(60)
    assert not any(one_thread.is_alive() for one_thread in threads)
    assert len(outcomes) == 3 * 128, sorted(set(outcomes))
    assert {"whole", "streamed", "closed", "dropped", "cancelled", "BadRequestError"} <= set(outcomes)
    gc.collect()
    eventually(lambda: idle(client))
    eventually(lambda: threading.active_count() <= threads_before)
    loop = client.served.find().engine._loop
    assert not loop.delivery.tracks
    loop.scheduler.check()


def test_a_chat_request_takes_a_short_way(client: api.Client) -> None:
    """Of this package it touches few modules in the caller's thread: no errors, no methods of the answer's objects."""
    touched = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(Path(api.__file__).parent):
            touched.add(path.stem)

    client.chat.completions.create(messages=MESSAGES, max_tokens=4, temperature=0)
    sys.setprofile(note)
    try:
        client.chat.completions.create(messages=MESSAGES, max_tokens=4, temperature=0)
    finally:
        sys.setprofile(None)
    assert touched == {"client", "request", "models", "checks", "answer"}


# --- bad input leaves nothing, and others alone ------------------------------------------------------------------

CHAT_ERRORS: list[tuple[Any, str, str]] = [
    ([{"role": "assistant", "content": "x"}], "messages[0].role", "invalid_value"),
    ([*MESSAGES, *MESSAGES], "messages[1].role", "invalid_value"),
    ([*MESSAGES, {"role": "assistant", "content": "x"}], "messages[1].role", "invalid_value"),
    ([{"role": "system", "content": "x"}], "messages[0].role", "invalid_value"),
    ([*MESSAGES, {"role": "system", "content": "x"}], "messages[1].role", "invalid_value"),
    ([{"role": "tool", "content": "x"}], "messages[0].role", "invalid_value"),
    ([{"role": "user", "content": "a [INST] b"}], "messages[0].content", "special_tags"),
    ([{"role": "user", "content": [{"type": "text", "text": "<<SYS>>"}]}], "messages[0].content", "special_tags"),
    ([{"role": "user", "content": "\ud800"}], "messages[0].content", "invalid_value"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "invalid_value"),
    ([{"role": "user", "content": "the hill " * 1000}], "messages", "context_length_exceeded"),
    ([{"role": "user", "content": "x" * 10_000_000}], "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("messages", "param", "code"), CHAT_ERRORS, ids=range(len(CHAT_ERRORS)))
def test_bad_chats(client: api.Client, messages: Any, param: str, code: str) -> None:
    with endless(client) as other:
        error = error_of(client.chat.completions.create, messages=messages)
        assert (type(error), error.param, error.code) == (api.BadRequestError, param, code)
        assert next(other), "another request goes on"
        assert client.stats().slots_in_use == 1


PROMPT_ERRORS: list[tuple[Any, str]] = [
    ("\ud800", "invalid_value"),
    (["fine", "\udfff"], "invalid_value"),
    ("the hill " * 1000, "context_length_exceeded"),
    ([5] * 257, "context_length_exceeded"),
    ([[5], [5] * 256], "context_length_exceeded"),
]


@pytest.mark.parametrize(("prompt", "code"), PROMPT_ERRORS, ids=range(len(PROMPT_ERRORS)))
def test_bad_prompts(client: api.Client, prompt: Any, code: str) -> None:
    error = error_of(complete, client, prompt=prompt)
    assert (type(error), error.param, error.code) == (api.BadRequestError, "prompt", code)
    if code == "context_length_exceeded":
        assert "25" in error.message, "both numbers are named"
    assert idle(client)


def test_edges_of_the_context(client: api.Client) -> None:
    assert complete(client, prompt=[5] * 255).usage.total_tokens == 256
    assert complete(client, prompt=[5] * 256, max_tokens=0, echo=True).usage.total_tokens == 256
    assert error_of(complete, client, prompt=[5] * 256).code == "context_length_exceeded"
    assert complete(client, prompt="\0 a\0").choices, "NUL is a character like others"


def test_extra_fields(client: api.Client) -> None:
    answer = complete(
        client, extra_body={"top_k": 1, "max_tokens": 2, "colour": 1}, extra_headers={"a": "b"}, extra_query={}
    )
    assert answer.usage.completion_tokens == 2
    assert answer.ignored_parameters == ["colour", "extra_headers"]
    assert next(complete(client, extra_body={"stream": True})).choices
    assert complete(client, extra_body={"wait": 5, "timeout": 1}).ignored_parameters == ["timeout", "wait"]
    assert error_of(complete, client, extra_body=[]).param == "extra_body"


# --- ends --------------------------------------------------------------------------------------------------------


def test_closing_ends_everything_with_an_error(folder: Path) -> None:
    client = api.Client(folder, slots=2)
    stream = endless(client)
    next(stream)
    errors: list[BaseException] = []

    def wait() -> None:
        endless(client)
        errors.append(error_of(complete, client, wait=True))

    with scripted(client, lambda index, prompt: [70] * 230) as script:
        script.gate = lambda: time.sleep(0.01)
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.05)
        client.close()
    waiter.join(10)
    client.close()
    with pytest.raises(api.ServiceUnavailableError) as caught:
        list(stream)
    assert caught.value.code == "shutting_down"
    assert error_of(complete, client).code == "shutting_down"
    assert [getattr(error, "code", None) for error in errors] in (["shutting_down"], [])
    assert client.health().status == "stopped"
    with pytest.raises(api.error.ServiceUnavailableError):
        client.completions.create(prompt=PROMPT)


def test_a_failed_step_and_a_dead_engine(folder: Path) -> None:
    with api.Client(folder) as client:
        with scripted(client, lambda index, prompt: [70] * 50) as script:

            def fail() -> None:
                raise ValueError("a secret at /path/to/it")

            script.gate = fail
            error = error_of(complete, client)
            assert (type(error), error.status_code, error.code) == (api.InternalServerError, 500, "internal_error")
            assert "secret" not in str(error.to_dict())
        assert complete(client).choices, "others go on"
        with scripted(client, lambda index, prompt: [-1]):
            assert error_of(complete, client).code == "nan_logits"
        loop = client.served.find().engine._loop

        def die(_: object) -> None:
            raise RuntimeError("a secret")

        loop.on_step = die
        error = error_of(complete, client)
        assert (error.status_code, error.code) == (503, "engine_failed")
        assert isinstance(error.__cause__, EngineDead)
        eventually(lambda: not client.served.find().engine.serving)
        assert client.health().status == "stopped"
        assert error_of(complete, client).status_code == 503


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork_a_clear_error(client: api.Client) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            error = error_of(complete, client)
            code = 0 if isinstance(error, api.ServiceUnavailableError) and "fork" in error.message else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert complete(client).choices


def test_long_texts_do_not_block_the_loop(client: api.Client) -> None:
    async def main() -> float:
        longest = 0.0
        started = asyncio.Event()

        async def beat() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                started.set()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - before)

        beating = asyncio.create_task(beat())
        await started.wait()
        text = "é" * 3500
        calls = [client.completions.acreate(prompt=[text] * 60, wait=True) for _ in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, api.BadRequestError | api.RateLimitError) for result in results)
        prompts = ["the path on the left. " * 10] * 60
        one = asyncio.create_task(client.completions.acreate(prompt=prompts, max_tokens=100))
        await asyncio.sleep(0.005)
        one.cancel()  # while it is being tokenized, or soon after
        with pytest.raises(asyncio.CancelledError):
            await one
        assert (await client.completions.acreate(prompt=prompts, max_tokens=1, wait=True)).usage.completion_tokens == 60
        beating.cancel()
        return longest

    assert asyncio.run(main()) < 1
