"""`ChunkStream` and `AsyncChunkStream`: the chunks of a running request, for threads and for event loops."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, Self

from api.answer import Chunk
from api.request import Running
from api.schema import Usage
from llama.stream import Delta


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
