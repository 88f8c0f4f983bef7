"""`Stream`: the caller's end of one request, an iterator of `Delta`s for threads and for event loops.

The engine thread never waits for a reader; max_tokens bounds what nobody reads. Closing or dropping it is an abort.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from llama.sequence import FinishReason, TokenLogprobs
from llama.slots import Seat


@dataclass(slots=True)
class Delta:
    """What sequence `index` of the request gained. Logprobs and offsets: one for each new token, when asked for."""

    index: int
    token_ids: list[int]
    text: str  # what is certain by now, possibly less or more than the tokens' own
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # in characters of the sequence's text
    finish_reason: FinishReason | None = None  # set in the last delta of the sequence
    prompt_logprobs: list[TokenLogprobs] | None = None  # set in the first, when asked for; the first token has none


MAX_TRACED_STEPS = 1024


@dataclass(slots=True)
class StepTrace:
    """One step of the engine, as a request saw it: how many tokens of its own, and of all sequences, it computed."""

    number: int
    n_tokens: int
    batch_seqs: int
    batch_tokens: int
    seconds: float


@dataclass(slots=True)
class RequestStats:
    """Times in seconds of time.monotonic(); counts of tokens. steps: the first ones, with `Request.trace`."""

    submitted: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    steps: list[StepTrace] | None = None

    def note_step(self, step: StepTrace) -> None:
        """Add a step; the sequences of one request that share a step make one entry."""
        if self.steps and self.steps[-1].number == step.number:
            self.steps[-1].n_tokens += step.n_tokens
        elif self.steps is not None and len(self.steps) < MAX_TRACED_STEPS:
            self.steps.append(step)


class Mailbox:
    """What the engine thread and a `Stream` share. It never refers to the stream, and outlives a dropped one.

    n_sequences: of the request. abort: asks the engine to drop them; called at most once.
    """

    def __init__(self, n_sequences: int, seat: Seat | None, abort: Callable[[Mailbox], None]) -> None:
        self.deltas: deque[Delta] = deque()
        self.error: BaseException | None = None
        self.unfinished = n_sequences
        self.stats = RequestStats(time.monotonic())
        self._seat, self._abort = seat, abort
        self._wake: Callable[[], None] | None = None
        self._lock = threading.RLock()  # the collector may drop a stream, and so abandon, anywhere

    def put(self, delta: Delta) -> None:
        """Engine thread: hand over a delta; `wake` follows when the step's deltas are all in."""
        ends = delta.finish_reason is not None
        if ends and self.unfinished == 1:
            self._end()  # before the delta: a reader that has seen the end finds the slot free
        with self._lock:
            if self.unfinished:  # else abandoned meanwhile
                self.deltas.append(delta)
                self.unfinished -= ends

    def fail(self, error: BaseException) -> None:
        """Engine thread: the request is over; the reader gets what is there, then the error."""
        if self.unfinished:
            self._end()
            self.error = error
            self.unfinished = 0
            self.wake()

    def abandon(self, error: BaseException | None = None) -> None:
        """Any thread: the request is over for its reader, who gets `error` unless it has seen the end or was to get
        another one. The slot is free at once, the blocks after the current step."""
        with self._lock:
            if self.unfinished or self.deltas:
                self.error = self.error or error
            unfinished, self.unfinished = self.unfinished, 0
        if unfinished:
            self._abort(self)
        self._end()
        self.wake()

    def take(self) -> Delta | None:
        """Reader: the next delta, if there is one."""
        try:
            return self.deltas.popleft() if self.deltas else None
        except IndexError:  # another thread has cleared them in between
            return None

    def wake(self) -> None:
        """Tell a waiting reader to look."""
        if self._wake is not None:
            with self._lock:
                wake, self._wake = self._wake, None
            if wake is not None:
                wake()

    def sleep(self, wake: Callable[[], None]) -> bool:
        """Reader: be woken by a call of `wake`; False when there is something to read by now."""
        with self._lock:
            self._wake = wake
        if self.deltas or not self.unfinished:
            with self._lock:
                self._wake = None
            return False
        return True

    def ended(self) -> bool:
        """Reader: whether nothing more will come. Raises what ended the request early."""
        if self.unfinished or self.deltas:
            return False
        if self.error is not None:
            raise self.error
        return True

    def _end(self) -> None:
        self.stats.finished = self.stats.finished or time.monotonic()
        if self._seat is not None:
            self._seat.release()


async def _before(timeout: float | None, awake: asyncio.Future[bool]) -> bool:
    """Wait for a future; False if that takes longer. `asyncio.timeout` would cost more, for every token."""
    if timeout is None:
        return await awake
    alarm = awake.get_loop().call_later(timeout, _settle, awake, False)
    try:
        return await awake
    finally:
        alarm.cancel()


def _settle(awake: asyncio.Future[bool], result: bool) -> None:
    if not awake.done():
        awake.set_result(result)


class _Bell:
    """Wakes the readers on one event loop. A step calls the loop once, however many readers it has served: each call is
    a system call in the engine thread, which must queue for the interpreter after it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._sleepers: deque[asyncio.Future[bool]] = deque()
        self._rung = False

    def ring(self, sleeper: asyncio.Future[bool]) -> None:
        """Let the loop set a future. From any thread, a finalizer among them."""
        self._sleepers.append(sleeper)
        if self._rung:
            return
        self._rung = True
        if (loop := self._loop()) is not None:
            with suppress(RuntimeError):  # the loop was closed with its reader still waiting
                loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # first: who rings from now on calls again
        while self._sleepers:
            _settle(self._sleepers.popleft(), True)


_BELLS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = weakref.WeakKeyDictionary()


class Stream:
    """Iterate (`for` or `async for`) until every sequence of the request has finished. One reader at a time.

    Raises from the iterator what ended the request early: RequestFailed, EngineDead, EngineClosed, `close`'s error.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._abandon = weakref.finalize(self, mailbox.abandon)
        self._abandon.atexit = False

    @property
    def stats(self) -> RequestStats:
        return self._mailbox.stats

    def get(self, timeout: float | None = None) -> Delta | None:
        """The next delta, waiting for it; None at the end. Raises TimeoutError after `timeout` seconds of nothing."""
        mailbox = self._mailbox
        while (delta := mailbox.take()) is None:
            if mailbox.ended():
                return None
            asleep = threading.Lock()
            asleep.acquire()
            if mailbox.sleep(asleep.release) and not asleep.acquire(timeout=-1 if timeout is None else timeout):
                raise TimeoutError(f"no token in {timeout} s")
        return delta

    async def get_async(self, timeout: float | None = None) -> Delta | None:
        """The same without blocking the event loop."""
        mailbox, loop = self._mailbox, asyncio.get_running_loop()
        bell = _BELLS.get(loop) or _BELLS.setdefault(loop, _Bell(loop))
        while (delta := mailbox.take()) is None:
            if mailbox.ended():
                return None
            awake: asyncio.Future[bool] = loop.create_future()
            if mailbox.sleep(partial(bell.ring, awake)) and not await _before(timeout, awake):
                raise TimeoutError(f"no token in {timeout} s")
        return delta

    def gathered(self) -> list[Delta]:
        """The deltas that can be had without waiting, perhaps none."""
        return list(iter(self._mailbox.take, None))

    def close(self, error: BaseException | None = None) -> None:
        """Abort what still runs and drop what was not read yet. Safe to call twice and from any thread.

        error: raised in the reader, where otherwise the stream just ends.
        """
        self._abandon.detach()
        self._mailbox.abandon(error)
        self._mailbox.deltas.clear()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        delta = self.get()
        if delta is None:
            raise StopIteration
        return delta

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        delta = await self.get_async()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
