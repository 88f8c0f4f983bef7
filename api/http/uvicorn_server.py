"""`HttpServer`: sockets and signals around an `App`, by uvicorn with the h11 parser.

Half-sent requests, unread answers and crowds are bounded here, for which uvicorn has no options. `Connection` puts its
own parser into uvicorn's protocol and reads the protocol's `cycle`. Neither is a documented interface, so
pyproject.toml bounds uvicorn's versions on both sides.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from enum import IntEnum
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import APIStatusError
from api.http.app import App
from api.http.limits import HttpLimits

log = logging.getLogger("api.server")

AT_ONCE = 16  # sockets that are read between two rounds of the event loop
TICK = 0.1  # seconds between two looks for a reason to end; every fifth time all connections are looked at, too
NEW = 1.0  # a connection younger than this may still be on its way through the event loop
REFUSALS = {
    431: ("The request's headers are too large.", "headers_too_large"),
    413: ("The body comes in too many pieces.", "request_too_large"),
}


class Exit(IntEnum):
    """Exit codes. 2 is left to wrong options."""

    DONE = 0  # asked to end, and every request was answered
    CANNOT_START = 1
    ENGINE_FAILED = 3
    ABORTED = 4  # asked to end, and requests were cut off


class InTurn(selectors.DefaultSelector):
    """Reports a few sockets at a time: the first of a crowd is answered before the last is read, and streams go on."""

    def __init__(self) -> None:
        super().__init__()
        self._ready: Sequence[tuple[selectors.SelectorKey, int]] = ()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not self._ready:  # otherwise the rest of last time, still ready, for a socket is until it is read
            self._ready = super().select(timeout)
        some, self._ready = self._ready[:AT_ONCE], self._ready[AT_ONCE:]
        known = self.get_map()
        return [(key, events) for key, events in some if known.get(key.fd) is key]  # others have changed meanwhile


class BoundedConnection(h11.Connection):
    """Refuses a body in too many pieces. The head of an answer goes out in one packet with the first of its body."""

    def __init__(self, limits: HttpLimits) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=limits.head + 1024)
        self._most, self._pieces = limits.body_pieces, 0
        self._head = b""

    def next_event(self) -> Any:
        event = super().next_event()
        if type(event) is h11.Data:
            self._pieces += 1
            if self._pieces > self._most:
                raise h11.RemoteProtocolError("too many pieces", error_status_hint=413)
        elif type(event) is h11.Request:
            self._pieces = 0
        return event

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]  # declared once for each kind of event
        data = super().send(event)
        if type(event) is h11.Response:
            self._head, data = data or b"", b""
        elif data is not None:
            self._head, data = b"", self._head + data
        return data


class Connection(H11Protocol):
    """One connection. waiting_since: since when a request is not all here; None: there is nothing to wait for.

    ending_since: since when the client has not read the last that will be written.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.limits: HttpLimits = self.config.app.limits  # type: ignore[union-attr]  # HttpServer puts an `App` there
        self.conn = BoundedConnection(self.limits)
        self.waiting_since: float | None = self.loop.time()
        self.ending_since: float | None = None
        self._received = False
        if len(self.connections) > self.limits.connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received = True
        super().data_received(data)
        if self._answering() and not self.cycle.more_body:
            self.waiting_since = None  # a request is all here
        elif self.waiting_since is None:
            self.waiting_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP; the parser's error, being handled, says more."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        message, code = REFUSALS.get(status, ("This is not a valid HTTP request.", "invalid_http"))
        self._refuse(status if status in REFUSALS else 400, message, code)

    def sweep(self, now: float) -> None:
        """End what has lasted too long; called now and then."""
        unread = not self._answering() and self.transport.get_write_buffer_size() > 0
        if unread or self.transport.is_closing():
            self.ending_since = self.ending_since or now
            if now - self.ending_since > self.limits.stalled:
                self.transport.abort()  # nobody reads what is left to write
            return
        self.ending_since = None
        if self.waiting_since is not None and now - self.waiting_since > self.limits.send:
            if self._answering():
                # A body on its way is timed by the application; this is for one that nobody reads.
                if now - self.waiting_since > 2 * self.limits.send:
                    self.transport.abort()
            elif self._received:
                message = f"The request was not complete after {self.limits.send:g} seconds."
                self._refuse(408, message, "request_timeout")
            else:
                self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer in place of the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(APIStatusError(message, code=code).to_dict()).encode()
            length, kind = str(len(body)), "application/json"
            headers = [("content-type", kind), ("content-length", length), ("connection", "close")]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves `app` on listening sockets until it is told to stop. exit_code: valid when `serve` has returned.

    The first signal to end stops taking requests and lets the running ones finish; the second ends them.
    """

    def __init__(self, app: App) -> None:
        config = uvicorn.Config(
            app,
            interface="asgi3",
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,  # what it says is either ours to say, or about strangers' mistakes
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(app.limits.idle),
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self.app = app
        self.exit_code = Exit.DONE
        self._signals = 0
        self._drain_until: float | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """`serve` on an event loop of its own."""
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(InTurn())) as runner:
            runner.run(self.serve(sockets))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(self._watch())
            await super().serve(sockets)
            watcher.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn, which would cut off what runs."""
        self.stop()

    def stop(self) -> None:
        """As a signal does: once, let running requests finish; twice, end them. From any thread."""
        self._signals += 1

    async def _watch(self) -> None:
        """Bound the connections until there is a reason to end. Closing the engines sends errors to whoever is left."""
        ticks = 0
        while (exit_code := self._reason_to_end()) is None:
            if ticks % 5 == 0:
                self._sweep()
            ticks += 1
            await asyncio.sleep(TICK)
        self.exit_code = exit_code
        self.app.draining = True
        if self.app.client is not None and self.app.active:
            await self.app.client.close()
        self.should_exit = True

    def _reason_to_end(self) -> Exit | None:
        if not self._signals:
            if not self.app.failed:
                return None
            log.error("an engine has stopped; nothing more can be served")
            return Exit.ENGINE_FAILED
        now = time.monotonic()
        if self._drain_until is None:
            self.app.draining = True
            self._drain_until = now + self.app.limits.drain
            log.info("no more requests are taken; %d are being finished", self.app.active)
        if not self.app.active:
            return Exit.DONE
        if self._signals > 1 or now > self._drain_until:
            log.warning("%d requests are cut off", self.app.active)
            return Exit.ABORTED
        return None

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        connections: list[Connection] = list(self.server_state.connections)  # type: ignore[arg-type]
        waiting = sorted((c.waiting_since, i) for i, c in enumerate(connections) if c.waiting_since is not None)
        # In a crowd of half-sent requests the oldest goes first: an honest client is never the oldest.
        for since, i in waiting[: max(len(waiting) - self.app.limits.unfinished, 0)]:
            if now - since > NEW:
                connections[i].transport.abort()
        for connection in connections:
            connection.sweep(now)


def settle() -> None:
    """Exempt what is loaded by now from garbage collection, which holds up every stream."""
    gc.collect()
    gc.freeze()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio switches Nagle's algorithm off, which delays answers, only where it sees TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # What a client does not read stays with us, where it is bounded, and not in the kernel's megabytes.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening
