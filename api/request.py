"""`Request`: one call on its way, from its fields to its answer, for threads and for event loops.

Every wait comes in two forms, for threads and for event loops; everything else is shared. Every way out gives the slot
back and stops the engine's work.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Self

from api.answer import Answer, Chunk, Whole, merge
from api.checks import Endpoint
from api.errors import APITimeoutError, bad_type, bad_value, from_engine
from api.models import Models
from api.schema import Usage
from llama.errors import EngineError, SlotsFull
from llama.slots import Seat
from llama.stream import Delta, Stream

# Longer texts are tokenized in a worker thread when the caller is an event loop.
LONG_TEXT = 16_384
MAX_SECONDS = 1e6  # threads cannot wait much longer


class Request(Generic[Whole, Chunk]):
    """A checked request; nothing is taken or queued yet. Raises APIError for wrong fields.

    wait, timeout: as `api.client` has them. salt: prompts share cached blocks only with prompts of the same salt.
    """

    def __init__(
        self, models: Models, endpoint: Endpoint, fields: Mapping[str, Any], wait: Any, timeout: Any, salt: str = ""
    ) -> None:
        self.model = models.find(fields.get("model"))
        self.arguments = self.model.read(endpoint, fields)
        self.salt = salt
        self.wait = _seconds("wait", models.settings.wait if wait is None else wait)
        self.deadline = Deadline(None if timeout is None else _seconds("timeout", timeout))

    def start(self) -> Running[Whole, Chunk]:
        """Take a slot, waiting as long as may be, and submit."""
        with self._slot_errors():
            seat = self.model.engine.slots.acquire(self._wait())
        return self._begin(seat)

    async def start_async(self) -> Running[Whole, Chunk]:
        """The same without blocking the event loop."""
        with self._slot_errors():
            seat = await self.model.engine.slots.acquire_async(self._wait())
        if self._n_characters() <= LONG_TEXT:
            return self._begin(seat)
        return await asyncio.to_thread(self._begin, seat)

    def _begin(self, seat: Seat) -> Running[Whole, Chunk]:
        try:
            stream, answer = self.model.begin(self.arguments, seat, self.salt)
        except EngineError as error:
            prompt_field = "messages" if self.arguments.endpoint == "chat" else "prompt"
            raise from_engine(error, prompt_field) from error
        return Running(stream, answer, self.deadline)

    def _wait(self) -> float | bool:
        left = self.deadline.left()
        if left is None or not self.wait:
            return self.wait
        return left if self.wait is True else min(left, self.wait)

    @contextmanager
    def _slot_errors(self) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            timed_out = isinstance(error, SlotsFull) and self.wait and self.deadline.passed
            raise (self.deadline.error() if timed_out else from_engine(error)) from error

    def _n_characters(self) -> int:
        texts = [prompt for prompt in self.arguments.prompts if isinstance(prompt, str)]
        return sum(map(len, texts)) + sum(len(str(message["content"])) for message in self.arguments.messages)


class Deadline:
    """When the caller's `timeout` passes; None: never."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end - 0.001  # waits end a little early

    def left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def error(self) -> APITimeoutError:
        return APITimeoutError(f"The request took longer than its timeout of {self.seconds} seconds.")


class Running(Generic[Whole, Chunk]):
    """A submitted request. An error, a passed deadline or an interrupted read ends it at once."""

    def __init__(self, stream: Stream, answer: Answer[Whole, Chunk], deadline: Deadline) -> None:
        self.stream, self.deadline = stream, deadline
        self.answer: Answer[Whole, Chunk] = answer

    def whole(self) -> Whole:
        """Wait for everything and fold it into one answer."""
        return self._fold(iter(self.get, None))

    async def whole_async(self) -> Whole:
        deltas = []
        while (delta := await self.get_async()) is not None:
            deltas.append(delta)
        return self._fold(deltas)

    def get(self) -> Delta | None:
        """The next delta, waiting for it; None at the end."""
        try:
            return self.stream.get(self._left())
        except BaseException as error:
            self._ended_by(error)
            raise

    async def get_async(self) -> Delta | None:
        try:
            return await self.stream.get_async(self._left())
        except BaseException as error:
            self._ended_by(error)
            raise

    def chunks(self, delta: Delta) -> list[Chunk]:
        """The chunks of a delta and of all that have gathered behind it."""
        return [chunk for merged in self._with_gathered(delta) for chunk in self.answer.chunks(merged)]

    def wire(self, delta: Delta) -> list[str]:
        """The same as JSON."""
        return [chunk for merged in self._with_gathered(delta) for chunk in self.answer.wire(merged)]

    def _with_gathered(self, delta: Delta) -> list[Delta]:
        others: list[Delta] = self.stream.gathered()
        return merge([delta, *others]) if others else [delta]

    def _fold(self, deltas: Iterable[Delta]) -> Whole:
        return self.answer.whole(chunk for delta in merge(deltas) for chunk in self.answer.chunks(delta))

    def _left(self) -> float | None:
        """Seconds until the deadline. Raises TimeoutError when it has passed, even if there is something to read."""
        if self.deadline.passed:
            raise TimeoutError
        return self.deadline.left()

    def _ended_by(self, error: BaseException) -> None:
        """Abort what still runs. Raises this interface's error for the engine's, and for a deadline."""
        self.stream.close()
        if isinstance(error, EngineError):
            raise from_engine(error) from error
        if isinstance(error, TimeoutError):
            raise self.deadline.error() from error


class ChunkReader(Generic[Chunk]):
    """What the two kinds of chunk streams share. The slot is held until one is exhausted, closed, failed or dropped."""

    def __init__(self, running: Running[Any, Chunk]) -> None:
        self._running: Running[Any, Chunk] = running
        self._ready: deque[Chunk] = deque()
        self._exhausted = False

    @property
    def usage(self) -> Usage | None:
        """The totals, once the last item is out."""
        return self._running.answer.usage if self._exhausted else None

    @property
    def ignored_parameters(self) -> list[str]:
        """Names of parameters that were accepted and not acted on."""
        return list(self._running.answer.arguments.ignored)

    @property
    def request_id(self) -> str:
        return self._running.answer.heading.request_id

    def _take(self, delta: Delta | None) -> None:
        if delta is None:
            self._exhausted = True
        else:
            self._ready.extend(self._running.chunks(delta))

    def _close(self) -> None:
        self._ready.clear()
        self._running.stream.close()


class ChunkStream(ChunkReader[Chunk]):
    """Iterate over the chunks. `close()`, `cancel()` or leaving `with` ends the request at once."""

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._ready:
            if self._exhausted:
                raise StopIteration
            self._take(self._running.get())
        return self._ready.popleft()

    def close(self) -> None:
        self._close()

    cancel = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class AsyncChunkStream(ChunkReader[Chunk]):
    """The same for `async for`; a task cancelled while it waits here ends the request."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._ready:
            if self._exhausted:
                raise StopAsyncIteration
            self._take(await self._running.get_async())
        return self._ready.popleft()

    async def close(self) -> None:
        self._close()

    aclose = cancel = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()


def _seconds(name: str, value: Any) -> Any:
    """A wait or a timeout: seconds, and for `wait` also True, False or None."""
    if name == "wait" and (value is None or isinstance(value, bool)):
        return bool(value)
    if type(value) not in (int, float):
        raise bad_type(name, value, "a number of seconds")
    if not 0 <= value < MAX_SECONDS:
        raise bad_value(name, value, f"must be from 0 to {MAX_SECONDS} seconds")
    return float(value)
