"""Seats for requests in flight: never over the limit, first come first served, each given back exactly once."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama.errors import EngineClosed, SlotsFull
from llama.slots import Seat, Slots


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until another thread has got there; a failure, not a hang, after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(slots: Slots) -> int:
    return len(slots._line)


def test_sixty_threads_on_thirty_slots() -> None:
    slots = Slots(30)
    lock = threading.Lock()
    inside = most = done = 0

    def work(_: int) -> None:
        nonlocal inside, most, done
        for _ in range(20):
            seat = slots.acquire(wait=True)
            with lock:
                inside += 1
                most = max(most, inside)
                assert inside <= 30
            time.sleep(0.0005)
            with lock:
                inside -= 1
                done += 1
            seat.release()

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(work, range(60)))
    assert (most, done, slots.in_use, waiting(slots)) == (30, 1200, 0, 0)


def test_a_full_house_refuses_at_once() -> None:
    slots = Slots(2)
    slots.expected_wait = lambda: 2.5
    seats = [slots.acquire(), slots.acquire()]
    for wait in (None, False, 0):
        with pytest.raises(SlotsFull) as caught:
            slots.acquire(wait)
        assert (caught.value.limit, caught.value.retry_after) == (2, 2.5)
    seats[0].release()
    assert slots.acquire() is not None


def test_waiting_has_an_end() -> None:
    slots = Slots(1)
    seat = slots.acquire()
    with pytest.raises(SlotsFull):
        slots.acquire(wait=0.01)
    assert waiting(slots) == 0
    seat.release()
    assert slots.in_use == 0


def test_first_come_first_served() -> None:
    slots = Slots(1)
    seat = slots.acquire()
    order: list[int] = []

    def stand_in_line(i: int) -> None:
        mine = slots.acquire(wait=True)
        order.append(i)
        mine.release()

    threads = []
    for i in range(20):
        threads.append(threading.Thread(target=stand_in_line, args=(i,)))
        threads[-1].start()
        eventually(lambda n=i: waiting(slots) == n + 1)
    with pytest.raises(SlotsFull):
        slots.acquire()  # nobody passes the line
    seat.release()
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert slots.in_use == 0


def test_a_seat_goes_to_the_next_in_line_and_not_to_who_asks_just_then() -> None:
    slots = Slots(1)
    seat = slots.acquire()
    got: list[Seat] = []
    thread = threading.Thread(target=lambda: got.append(slots.acquire(wait=True)))
    thread.start()
    eventually(lambda: waiting(slots) == 1)
    seat.release()
    with pytest.raises(SlotsFull):
        slots.acquire()
    thread.join()
    assert (len(got), slots.in_use) == (1, 1)


def test_giving_back_twice_is_giving_back_once() -> None:
    slots = Slots(2)
    first, _second = slots.acquire(), slots.acquire()
    first.release()
    first.release()
    del first
    gc.collect()
    assert slots.in_use == 1


def test_dropping_a_seat_gives_it_back() -> None:
    slots = Slots(1)
    seat = slots.acquire()
    assert slots.in_use == 1
    del seat
    gc.collect()
    assert slots.in_use == 0


def test_a_seat_in_a_cycle_is_given_back_by_the_collector() -> None:
    slots = Slots(1)
    cycle: list[object] = [slots.acquire()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert slots.in_use == 0


def test_close_wakes_the_line_and_refuses_newcomers() -> None:
    slots = Slots(1)
    seat = slots.acquire()
    errors: list[Exception] = []

    def stand_in_line() -> None:
        try:
            slots.acquire(wait=True)
        except EngineClosed as error:
            errors.append(error)

    threads = [threading.Thread(target=stand_in_line) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: waiting(slots) == 3)
    slots.close()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    with pytest.raises(EngineClosed):
        slots.acquire()
    seat.release()
    assert slots.in_use == 0


# --- event loops ------------------------------------------------------------------------------------------------


def test_async_waiters_are_served_in_order_without_blocking_the_loop() -> None:
    async def main() -> list[int]:
        slots = Slots(2)
        order: list[int] = []

        async def work(i: int) -> None:
            seat = await slots.acquire_async(wait=True)
            order.append(i)
            assert slots.in_use <= 2
            await asyncio.sleep(0)
            seat.release()

        await asyncio.gather(*(work(i) for i in range(30)))
        assert slots.in_use == 0
        return order

    assert asyncio.run(main()) == list(range(30))


def test_a_cancelled_waiter_leaves_the_line() -> None:
    async def main() -> None:
        slots = Slots(1)
        seat = await slots.acquire_async()
        first = asyncio.create_task(slots.acquire_async(wait=True))
        second = asyncio.create_task(slots.acquire_async(wait=True))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        seat.release()
        got = await second
        got.release()
        assert (slots.in_use, waiting(slots)) == (0, 0)

    asyncio.run(main())


def test_a_seat_that_comes_with_the_cancellation_goes_on_to_the_next() -> None:
    async def main() -> None:
        slots = Slots(1)
        seat = await slots.acquire_async()
        first = asyncio.create_task(slots.acquire_async(wait=True))
        second = asyncio.create_task(slots.acquire_async(wait=True))
        await asyncio.sleep(0)
        seat.release()  # first has it now, and does not know
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        got = await asyncio.wait_for(second, 10)
        got.release()
        assert (slots.in_use, waiting(slots)) == (0, 0)

    asyncio.run(main())


def test_an_async_wait_has_an_end() -> None:
    async def main() -> None:
        slots = Slots(1)
        seat = await slots.acquire_async()
        for wait in (None, False, 0.01):
            with pytest.raises(SlotsFull):
                await slots.acquire_async(wait)
        assert waiting(slots) == 0
        seat.release()

    asyncio.run(main())


def test_close_wakes_async_waiters() -> None:
    async def main() -> None:
        slots = Slots(1)
        seat = await slots.acquire_async()
        waiter = asyncio.create_task(slots.acquire_async(wait=True))
        await asyncio.sleep(0)
        threading.Thread(target=slots.close).start()
        with pytest.raises(EngineClosed):
            await waiter
        seat.release()

    asyncio.run(main())


def test_a_loop_that_is_gone_does_not_hurt_who_gives_the_seat_back() -> None:
    """The engine thread gives seats back; an exception there would end the engine for everybody."""
    slots = Slots(1)
    seat = slots.acquire()
    loop = asyncio.new_event_loop()
    waiter = slots.acquire_async(wait=True)
    task = loop.create_task(waiter)
    loop.run_until_complete(asyncio.sleep(0))
    assert waiting(slots) == 1
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    seat.release()
    assert slots.in_use == 1, "it went to the one in line"
    waiter.close()
    assert (slots.in_use, waiting(slots)) == (0, 0)


def test_threads_and_tasks_share_one_line() -> None:
    slots = Slots(1)
    seat = slots.acquire()

    async def main() -> None:
        task = asyncio.create_task(slots.acquire_async(wait=True))
        await asyncio.sleep(0)
        seat.release()
        (await task).release()

    asyncio.run(main())
    assert slots.in_use == 0


# --- any order of calls -----------------------------------------------------------------------------------------


class SlotsMachine(RuleBasedStateMachine):
    """acquire, release, release again and drop, against two counters."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(3)
        self.held: list[Seat] = []
        self.given_back: list[Seat] = []

    @rule()
    def acquire(self) -> None:
        if len(self.held) < 3:
            self.held.append(self.slots.acquire())
        else:
            with pytest.raises(SlotsFull):
                self.slots.acquire()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seat = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        seat.release()
        self.given_back.append(seat)

    @precondition(lambda self: self.given_back)
    @rule()
    def release_again(self) -> None:
        self.given_back[-1].release()

    @precondition(lambda self: self.held)
    @rule()
    def drop(self) -> None:
        del self.held[0]

    @precondition(lambda self: self.given_back)
    @rule()
    def drop_what_was_given_back(self) -> None:
        del self.given_back[0]

    @invariant()
    def count(self) -> None:
        assert self.slots.in_use == len(self.held)


SlotsMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestAnyOrder = SlotsMachine.TestCase
