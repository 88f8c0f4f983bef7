"""The caller's end of a request: reading, closing, dropping and cancelling, alone and on a running engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from llama import Engine, EngineConfig, ModelConfig, Request, SamplingParams
from llama.errors import EngineClosed, RequestFailed
from llama.sequence import FinishReason
from llama.slots import Seat, Slots
from llama.stream import Delta, Mailbox, Stream

TINY = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=61, max_seq_len=256, dtype="float32"
)
LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until another thread has got there; a failure, not a hang, after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def token(i: int, finish_reason: FinishReason | None = None, index: int = 0) -> Delta:
    return Delta(index, [i], f"{i} ", finish_reason=finish_reason)


class Caller:
    """A stream without an engine; the test plays the engine thread."""

    def __init__(self, n_sequences: int = 1) -> None:
        self.slots = Slots(1)
        self.aborts: list[Mailbox] = []
        self.mailbox = Mailbox(n_sequences, self.slots.acquire(), self.aborts.append)
        self.stream = Stream(self.mailbox)


# --- the mailbox alone ------------------------------------------------------------------------------------------


def test_deltas_come_in_order_and_then_the_end() -> None:
    caller = Caller(2)
    caller.mailbox.put(token(1))
    caller.mailbox.put(token(2, FinishReason.STOP, index=1))
    assert caller.slots.in_use == 1, "one of two sequences still runs"
    caller.mailbox.put(token(3, FinishReason.LENGTH))
    assert caller.slots.in_use == 0
    assert [delta.token_ids for delta in caller.stream] == [[1], [2], [3]]
    assert caller.stream.get() is None
    assert caller.aborts == []


def test_the_slot_is_free_before_the_reader_sees_the_end() -> None:
    """Else a caller that asks for one answer after the other could be refused its own slot."""
    caller = Caller()
    seen: list[int] = []

    class Spy(type(caller.mailbox.deltas)):  # type: ignore[misc]
        def append(self, delta: Delta) -> None:
            seen.append(caller.slots.in_use)
            super().append(delta)

    caller.mailbox.deltas = Spy()
    caller.mailbox.put(token(1))
    caller.mailbox.put(token(2, FinishReason.STOP))
    assert seen == [1, 0]


def test_a_failure_comes_after_what_was_there() -> None:
    caller = Caller()
    caller.mailbox.put(token(1))
    caller.mailbox.fail(RequestFailed("nan_logits", "not finite"))
    caller.mailbox.fail(RequestFailed("other", "later"))
    assert caller.slots.in_use == 0
    assert next(caller.stream).token_ids == [1]
    for _ in range(2):
        with pytest.raises(RequestFailed, match="not finite"):
            next(caller.stream)


def test_closing_twice_aborts_once() -> None:
    caller = Caller()
    caller.mailbox.put(token(1))
    caller.stream.close()
    caller.stream.close()
    assert caller.aborts == [caller.mailbox]
    assert caller.slots.in_use == 0
    assert list(caller.stream) == [], "what was not read is dropped"


def test_closing_after_the_end_aborts_nothing() -> None:
    caller = Caller()
    caller.mailbox.put(token(1, FinishReason.STOP))
    caller.stream.close()
    assert (caller.aborts, caller.slots.in_use) == ([], 0)


@pytest.mark.parametrize("end", [token(2, FinishReason.STOP), token(2)], ids=["its last", "not its last"])
def test_a_step_that_was_running_when_the_stream_was_closed(end: Delta) -> None:
    """Its tokens come too late; a reader in another thread must still come to the end."""
    caller = Caller()
    caller.stream.close()
    caller.mailbox.put(end)
    caller.mailbox.wake()
    assert caller.stream.get(timeout=10) is None


def test_closing_wakes_a_reader_in_another_thread() -> None:
    caller = Caller()
    read: list[Delta | None] = []
    reader = threading.Thread(target=lambda: read.append(caller.stream.get()))
    reader.start()
    eventually(lambda: caller.mailbox._wake is not None)
    caller.stream.close()
    reader.join(10)
    assert read == [None]


def test_closing_while_another_thread_reads() -> None:
    """No error in the reader, wherever the close meets it."""
    for _ in range(200):
        caller = Caller()
        errors: list[BaseException] = []

        def read(caller: Caller = caller, errors: list[BaseException] = errors) -> None:
            try:
                for _ in caller.stream:
                    pass
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for i in range(20):
            caller.mailbox.put(token(i))
            caller.mailbox.wake()
        caller.stream.close()
        caller.mailbox.put(token(20, FinishReason.STOP))
        caller.mailbox.wake()
        reader.join(10)
        assert not reader.is_alive()
        assert errors == []


def test_a_dropped_stream_that_was_never_read() -> None:
    caller = Caller()
    del caller.stream
    gc.collect()
    assert (caller.aborts, caller.slots.in_use) == ([caller.mailbox], 0)


def test_leaving_a_with_block_closes() -> None:
    caller = Caller()
    with caller.stream as stream:
        caller.mailbox.put(token(1))
        assert next(stream).token_ids == [1]
    assert (caller.aborts, caller.slots.in_use) == ([caller.mailbox], 0)


def test_a_timeout() -> None:
    caller = Caller()
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        caller.stream.get(timeout=0.01)
    caller.mailbox.put(token(1))
    delta = caller.stream.get(timeout=0.01)
    assert delta is not None, "a timeout is not the end"


def test_an_event_loop_reads() -> None:
    async def main() -> list[list[int]]:
        caller = Caller()

        def engine() -> None:
            for i in range(50):
                caller.mailbox.put(token(i, FinishReason.STOP if i == 49 else None))
                caller.mailbox.wake()

        threading.Thread(target=engine).start()
        return [delta.token_ids async for delta in caller.stream]

    assert asyncio.run(main()) == [[i] for i in range(50)]


def test_a_cancelled_reader_may_go_on_reading() -> None:
    async def main() -> None:
        caller = Caller()
        reader = asyncio.create_task(caller.stream.get_async())
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert (caller.aborts, caller.slots.in_use) == ([], 1)
        caller.mailbox.put(token(1))
        caller.mailbox.wake()
        delta = await caller.stream.get_async()
        assert delta is not None

    asyncio.run(main())


def test_a_reader_whose_loop_is_gone_does_not_hurt_the_engine_thread() -> None:
    caller = Caller()

    async def main() -> None:
        reader = asyncio.create_task(caller.stream.get_async())
        await asyncio.sleep(0)
        reader.cancel()

    asyncio.run(main())
    caller.mailbox.put(token(1))
    caller.mailbox.wake()
    delta = caller.stream.get()
    assert delta is not None


def test_an_async_reader_waits_no_longer_than_it_is_told() -> None:
    async def main() -> None:
        caller = Caller()
        with pytest.raises(TimeoutError, match=r"no token in 0\.01 s"):
            await caller.stream.get_async(0.01)
        assert (caller.aborts, caller.slots.in_use) == ([], 1)
        caller.mailbox.put(token(1))
        assert await caller.stream.get_async(0.0) is not None
        reader = asyncio.create_task(caller.stream.get_async(60))
        await asyncio.sleep(0)
        caller.mailbox.put(token(2))
        caller.mailbox.wake()
        delta = await reader
        assert delta is not None and delta.token_ids == [2]

    asyncio.run(main())


def test_who_closes_a_stream_may_say_why() -> None:
    async def main() -> None:
        caller = Caller()
        reader = asyncio.create_task(caller.stream.get_async())
        await asyncio.sleep(0)
        caller.stream.close(ZeroDivisionError("too late"))
        with pytest.raises(ZeroDivisionError, match="too late"):
            await reader
        assert (len(caller.aborts), caller.slots.in_use) == (1, 0)
        caller.stream.close(ValueError("the first reason stays"))
        with pytest.raises(ZeroDivisionError):
            await caller.stream.get_async()
        assert len(caller.aborts) == 1

    asyncio.run(main())


def test_a_reader_that_has_not_seen_the_end_yet_hears_why_it_was_closed() -> None:
    """Everything is computed, but the reader is late: what it lacks must not pass for a whole answer."""
    caller = Caller()
    caller.mailbox.put(token(1, FinishReason.LENGTH))
    caller.stream.close(ZeroDivisionError("too late"))
    with pytest.raises(ZeroDivisionError):
        caller.stream.get()
    read = Caller()
    read.mailbox.put(token(1, FinishReason.LENGTH))
    assert read.stream.get() is not None
    read.stream.close(ZeroDivisionError("too late"))
    assert read.stream.get() is None


# --- on an engine -----------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A random model, four slots, and the pool audited before every step."""
    config = EngineConfig(slots=4, block_size=8, kv_memory=1 << 20)
    with Engine(TINY, config, progress=False) as engine:
        engine._loop.on_step = lambda loop: loop.scheduler.check()
        yield engine
        assert_idle(engine)


def assert_idle(engine: Engine) -> None:
    eventually(lambda: engine.stats().blocks_free == engine.stats().blocks)
    assert engine.stats().slots_in_use == 0
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    assert engine._loop.delivery.tracks == {}
    assert engine._loop.error is None


def request(n: int = 1, params: SamplingParams = LONG) -> Request:
    return Request([[1, 5, 9]], params, n=n)


def test_streamed_tokens_are_the_whole_answer(engine: Engine) -> None:
    whole = engine.generate([[1, 5, 9]], LONG)[0]
    streamed = [t for delta in engine.submit(request()) for t in delta.token_ids]
    assert streamed == whole.token_ids
    assert len(streamed) == 200


def test_each_sequence_ends_once(engine: Engine) -> None:
    ends: list[int] = []
    for delta in engine.submit(request(n=4, params=SamplingParams(max_tokens=9, ignore_eos=True))):
        assert delta.index not in ends
        if delta.finish_reason is not None:
            ends.append(delta.index)
    assert sorted(ends) == [0, 1, 2, 3]


@pytest.mark.parametrize("n_read", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 3])
def test_closing_gives_back_slot_and_blocks(engine: Engine, n_read: int, n: int) -> None:
    stream = engine.submit(request(n=n))
    for _ in range(n_read):
        next(stream)
    stream.close()
    assert engine.stats().slots_in_use == 0, "the slot at once"
    stream.close()
    assert list(stream) == []
    assert_idle(engine)


def test_dropping_without_ever_reading(engine: Engine) -> None:
    for _ in range(20):
        engine.submit(request(), wait=True)  # four slots: from the fifth on each needs the slot of a dropped one
    gc.collect()
    assert_idle(engine)


def test_dropping_half_read(engine: Engine) -> None:
    stream = engine.submit(request())
    next(stream)
    del stream
    gc.collect()
    assert_idle(engine)


def test_a_generator_around_a_stream_that_never_started(engine: Engine) -> None:
    """Such a generator runs no `finally`; what gives slot and blocks back is the stream it lets go."""
    pieces = (delta.text for delta in engine.submit(request()))
    del pieces
    gc.collect()
    assert_idle(engine)


def test_closing_from_another_thread_ends_the_reader(engine: Engine) -> None:
    stream = engine.submit(request())
    threading.Timer(0.005, stream.close).start()
    assert len(list(stream)) <= 200
    assert_idle(engine)


def test_cancelling_a_task_that_reads(engine: Engine) -> None:
    async def read() -> None:
        with engine.submit(request()) as stream:
            async for _ in stream:
                pass

    async def main() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert_idle(engine)


def test_many_event_loops_and_threads_read_at_once(engine: Engine) -> None:
    expected = engine.generate([[1, 5, 9]], LONG)[0].token_ids
    results: list[list[int]] = []

    async def read() -> list[int]:
        seat = await engine.slots.acquire_async(wait=True)
        stream = engine.submit(request(), seat=seat)
        return [t async for delta in stream for t in delta.token_ids]

    async def three() -> None:
        results.extend(await asyncio.gather(read(), read(), read()))

    threads = [threading.Thread(target=lambda: asyncio.run(three())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 9


def test_a_refused_request_gives_its_seat_back(engine: Engine) -> None:
    seat: Seat = engine.slots.acquire()
    with pytest.raises(Exception, match="token ids"):
        engine.submit(Request([[1, 61]], LONG), seat=seat)
    assert engine.stats().slots_in_use == 0


def test_closing_the_engine_ends_its_streams() -> None:
    engine = Engine(TINY, EngineConfig(slots=4, block_size=8, kv_memory=1 << 20), progress=False)
    streams = [engine.submit(request()) for _ in range(4)]
    next(streams[0])
    engine.close()
    engine.close()
    for stream in streams:
        with pytest.raises(EngineClosed):
            list(stream)
        stream.close()
    assert engine.slots.in_use == 0
    assert not engine._thread.is_alive()
