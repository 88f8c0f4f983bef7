"""`Slots`: seats for requests in flight. A request over the limit is refused at once, or waits in line for a seat."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

from llama.errors import EngineClosed, SlotsFull


class Seat:
    """One taken slot. `release()` gives it back once, however often it is called; so does dropping the object."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._finalizer = weakref.finalize(self, give_back)

    def release(self) -> None:
        self._finalizer()


@dataclass(eq=False)
class _Waiter:
    """Someone in line. got_it: whether a seat came; None: not settled yet. wake: called then, under the lock."""

    wake: Callable[[], None]
    got_it: bool | None = None

    def settle(self, got_it: bool) -> None:
        self.got_it = got_it
        self.wake()


class Slots:
    """`limit` seats, first come first served, for any thread and any event loop. in_use: those taken.

    expected_wait: seconds until a seat may be free, as far as the owner knows; told to those who are refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.expected_wait: Callable[[], float] = lambda: 1.0
        self.in_use = 0
        self._closed = False
        self._line: deque[_Waiter] = deque()
        # Reentrant: a Seat may be finalized by the garbage collector inside one of these very methods.
        self._lock = threading.RLock()

    def acquire(self, wait: float | bool | None = None) -> Seat:
        """A seat. wait: None or False = now or never, True = for ever, else seconds. Raises SlotsFull, EngineClosed."""
        # A SimpleQueue may be filled from a finalizer in any thread, which an Event may not.
        arrived: SimpleQueue[None] = SimpleQueue()
        waiter = self._take_or_queue(bool(wait), partial(arrived.put, None))
        if waiter is not None:
            with self._in_line(waiter):
                arrived.get(timeout=None if wait is True else float(wait or 0))
        return Seat(self._give_back)

    async def acquire_async(self, wait: float | bool | None = None) -> Seat:
        """The same for event loops: waiting does not block the loop, and a cancelled task leaves the line."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed; the task's own end gives the seat on
                loop.call_soon_threadsafe(arrived.set)

        waiter = self._take_or_queue(bool(wait), wake)
        if waiter is not None:
            with self._in_line(waiter):
                await asyncio.wait_for(arrived.wait(), None if wait is True else float(wait or 0))
        return Seat(self._give_back)

    def close(self) -> None:
        """Nobody gets a seat any more; those in line get EngineClosed."""
        with self._lock:
            self._closed = True
            while self._line:
                self._line.popleft().settle(False)

    def _take_or_queue(self, may_wait: bool, wake: Callable[[], None]) -> _Waiter | None:
        """Take a seat (None), or stand in line (the waiter)."""
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if self.in_use < self.limit and not self._line:
                self.in_use += 1
                return None
            if not may_wait:
                raise SlotsFull(self.limit, self.expected_wait())
            waiter = _Waiter(wake)
            self._line.append(waiter)
            return waiter

    @contextmanager
    def _in_line(self, waiter: _Waiter) -> Iterator[None]:
        """Around the wait for a seat. Raises unless one has come in time."""
        try:
            with suppress(Empty, TimeoutError):
                yield
        except BaseException:  # interrupted; a seat that came at the same moment goes to the next
            with self._lock:
                if waiter.got_it is None:
                    self._line.remove(waiter)
                elif waiter.got_it:
                    self._give_back()
            raise
        with self._lock:
            if waiter.got_it is None:
                self._line.remove(waiter)
                raise SlotsFull(self.limit, self.expected_wait())
        if not waiter.got_it:
            raise EngineClosed("the engine was closed while the request waited for a slot")

    def _give_back(self) -> None:
        with self._lock:
            if self._line:
                self._line.popleft().settle(True)  # the seat changes hands; `in_use` stays
            else:
                self.in_use -= 1
