"""The two routes that generate: a request's way from its body to its last byte, streamed or whole.

The slot is held all the way. When the client goes, the request is aborted.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.checks import Endpoint, missing
from api.client import AsyncClient
from api.errors import APIError, APIStatusError, ServiceUnavailableError
from api.http.limits import HttpLimits
from api.http.middleware import ClientGone, Stalled, read_object
from api.http.request_log import RequestLog
from api.models import ServedModel
from api.request import Request, Running

EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
Interrupt = Callable[[Exception], None]


@dataclass(frozen=True)
class Completions:
    """ASGI for one endpoint. serving: the client, or a 503. seat: one of the key's slots, held inside `with`.

    gap: is told the seconds between two events of a stream.
    """

    endpoint: Endpoint
    serving: Callable[[], AsyncClient]
    seat: Callable[[RequestLog, ServedModel], AbstractContextManager[None]]
    gap: Callable[[float], None]
    limits: HttpLimits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        log: RequestLog = scope["log"]
        client = self.serving()
        fields = await read_object(scope, receive, self.limits)
        if fields.get("model") is None:
            raise missing("model")
        request: Request[Any, Any] = Request(client.served, self.endpoint, fields, False, None, salt=log.key)
        log.model, log.stream = request.model.name, request.arguments.stream
        with self.seat(log, request.model):
            async with self._watched(log, receive) as interrupt:
                loop = asyncio.get_running_loop()
                end = loop.time() + self.limits.request
                running = await request.start_async()
                log.began(running.answer)
                alarm = loop.call_at(end, running.stream.close, self._late())
                try:
                    if request.arguments.stream:
                        await self._stream(running, log, Events(send, self.limits, interrupt))
                    else:
                        answer = await running.whole_async()
                        await Response(answer.to_json(), media_type="application/json")(scope, receive, send)
                finally:
                    alarm.cancel()
                    running.stream.close()
                    log.count(running.answer)

    async def _stream(self, running: Running[Any, Any], log: RequestLog, events: Events) -> None:
        """Chunks as they come. What fails before the first one is raised, and so has its HTTP status."""
        chunks = await _next(running)
        async with events.kept_alive():
            try:
                while chunks:
                    await events.write(chunks)
                    chunks = await _next(running)
                    self.gap(time.monotonic() - events.last)
                await events.end()
            except APIError as error:
                log.failed(error)
                await events.end(error)

    def _late(self) -> APIStatusError:
        message = f"The request took longer than {self.limits.request:g} seconds."
        return APIStatusError(message, type="server_error", code="deadline_exceeded", status_code=504)

    @asynccontextmanager
    async def _watched(self, log: RequestLog, receive: Receive) -> AsyncIterator[Interrupt]:
        """End what is inside when the client goes, or when no step has taken the request up in time.

        Gives a function that ends it for other reasons.
        """

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            interrupt(ClientGone())

        def check_waiting() -> None:
            if log.stats is not None and log.stats.first_scheduled is None:
                message = f"The request waited {self.limits.queue:g} seconds for its turn. Please try again later."
                interrupt(ServiceUnavailableError(message, code="queue_timeout"))

        async with interruptible() as interrupt:
            watcher = asyncio.create_task(hang_up())
            timer = asyncio.get_running_loop().call_later(self.limits.queue, check_waiting)
            try:
                yield interrupt
            finally:
                watcher.cancel()
                timer.cancel()


@asynccontextmanager
async def interruptible() -> AsyncIterator[Interrupt]:
    """Gives a function for others on this event loop: called with an error, it ends what is inside with that error."""
    errors: list[Exception] = []

    def interrupt(error: Exception) -> None:
        errors.append(error)
        scope.reschedule(0)  # a time in the past: now

    try:
        async with asyncio.timeout(None) as scope:
            yield interrupt
    except TimeoutError:
        if errors:
            raise errors[0] from None
        raise


async def _next(running: Running[Any, Any]) -> list[str]:
    """The next chunks as JSON, one or more; none at the end."""
    while (delta := await running.get_async()) is not None:
        if chunks := running.wire(delta):
            return chunks
    return []


@dataclass
class Events:
    """Writes a stream of server-sent events. last: when the last one was written.

    interrupt: is called with Stalled when the client does not read.
    """

    send: Send
    limits: HttpLimits
    interrupt: Interrupt
    begun: bool = False
    writing_since: float | None = None
    last: float = field(default_factory=time.monotonic)

    async def write(self, chunks: Sequence[str]) -> None:
        """One event for each chunk, in one write. chunks: each a line of JSON in ASCII."""
        await self._write("".join(f"data: {chunk}\n\n" for chunk in chunks).encode())

    async def end(self, error: APIError | None = None) -> None:
        """The mark of a whole stream; or the error that ended it early, and no mark."""
        last = "[DONE]" if error is None else json.dumps(error.to_dict())
        await self._write(f"data: {last}\n\n".encode(), more=False)

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Fill long pauses, and end the request of a client that does not read."""
        # One sleeping task each for the whole stream costs less than timers for every event.
        tasks = [asyncio.create_task(self._fill_pauses()), asyncio.create_task(self._watch_writes())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _fill_pauses(self) -> None:
        """Comment lines, so that nobody in between takes the connection for dead."""
        quiet = self.limits.quiet
        while True:
            await asyncio.sleep(max(self.last + quiet - time.monotonic(), 0.01))
            if time.monotonic() - self.last >= quiet and self.begun and self.writing_since is None:
                await self._write(b": still here\n\n")

    async def _watch_writes(self) -> None:
        left = stalled = self.limits.stalled
        while left > 0:
            await asyncio.sleep(left)
            since = self.writing_since
            left = stalled if since is None else since + stalled - time.monotonic()
        self.interrupt(Stalled())

    async def _write(self, data: bytes, more: bool = True) -> None:
        self.writing_since = self.writing_since or time.monotonic()
        if not self.begun:
            self.begun = True
            await self.send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await self.send({"type": "http.response.body", "body": data, "more_body": more})
        self.writing_since, self.last = None, time.monotonic()
