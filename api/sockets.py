"""`HttpServer`: sockets and signals around a `Server`, by uvicorn with the h11 parser.

uvicorn times only idle connections; here half-sent requests, unread answers and crowds are bounded as well. The first
signal to end stops taking requests and lets the running ones finish; the second ends them.
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
from api.server import Server
from api.visit import EdgeLimits

log = logging.getLogger("api.server")

AT_ONCE = 16  # sockets that are read between two rounds of the event loop
SWEEP = 0.5  # seconds between two looks at all connections
NEW = 1.0  # a connection younger than this may still be on its way through the event loop


class Exit(IntEnum):
    """Exit codes. 2 is left to wrong options."""

    DONE = 0  # asked to end, and every request was answered
    CANNOT_START = 1
    ENGINE_FAILED = 3
    ABORTED = 4  # asked to end, and requests were cut off


class InTurn(selectors.DefaultSelector):
    """Reports a few sockets at a time, so that the first of a crowd is answered before the last is even read, and
    streams go on in between. What is asked for in vain is asked for again: a socket stays ready until it is read."""

    def __init__(self) -> None:
        super().__init__()
        self._ready: Sequence[tuple[selectors.SelectorKey, int]] = ()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not self._ready:
            self._ready = super().select(timeout)
        some, self._ready = self._ready[:AT_ONCE], self._ready[AT_ONCE:]
        known = self.get_map()
        return [(key, events) for key, events in some if known.get(key.fd) is key]  # others have changed meanwhile


class BoundedConnection(h11.Connection):
    """Refuses a body that comes in too many pieces: each costs time, however small it is.

    The head of an answer goes out with the first piece of its body: one packet, and one system call less.
    """

    def __init__(self, limits: EdgeLimits) -> None:
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
    """One connection. waiting_since: since when a request is not all here; None while there is nothing to wait for.

    ending_since: since when all is written that will be, and the client has not read it.
    """

    def __init__(self, config: uvicorn.Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.limits: EdgeLimits = config.app.limits  # type: ignore[union-attr]  # the app is an Edge
        self.conn = BoundedConnection(self.limits)
        self.waiting_since: float | None = None
        self.ending_since: float | None = None
        self._received = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        if len(self.connections) > self.limits.connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received = True
        super().data_received(data)
        if self._complete():
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP; the parser's error, being handled, says more."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        known = {
            431: ("The request's headers are too large.", "headers_too_large"),
            413: ("The body comes in too many pieces.", "request_too_large"),
        }
        message, code = known.get(status, ("This is not a valid HTTP request.", "invalid_http"))
        self._refuse(status if status in known else 400, message, code)

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

    def _complete(self) -> bool:
        """Whether a request is all here, and being answered."""
        return self._answering() and not self.cycle.more_body

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer in place of the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = APIStatusError(message, code=code, status_code=status)
            body = json.dumps(error.to_dict()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves `server` on listening sockets until it is told to stop. exit_code: valid when `serve` has returned."""

    def __init__(self, server: Server) -> None:
        limits = server.limits
        config = uvicorn.Config(
            server.app,
            interface="asgi3",
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(limits.idle),
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        # What it says is either ours to say, or about strangers' mistakes.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.server = server
        self.exit_code = Exit.DONE
        self._signals = 0
        self._drain_until: float | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """`serve` on an event loop of its own."""
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(InTurn())) as runner:
            runner.run(self.serve(sockets))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """As a signal does: once, let running requests finish; twice, end them. From any thread."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        await super().on_tick(counter)
        if counter % int(SWEEP * 10) == 0:
            self._sweep()
        if self.server.failed and not self._signals:
            log.error("an engine has stopped; nothing more can be served")
            self.exit_code = Exit.ENGINE_FAILED
            return True
        if not self._signals:
            return False
        now = time.monotonic()
        if self._drain_until is None:
            self.server.draining = True
            self._drain_until = now + self.server.limits.drain
            log.info("no more requests are taken; %d are being finished", self.server.active)
        if not self.server.active:
            return True
        if self._signals > 1 or now > self._drain_until:
            log.warning("%d requests are cut off", self.server.active)
            self.exit_code = Exit.ABORTED
            return True
        return False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever is still being served gets an error, and not silence: their engines are closed first."""
        self.server.draining = True
        if self.server.client is not None and self.server.active:
            await self.server.client.close()
        await super().shutdown(sockets)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        connections: list[Connection] = list(self.server_state.connections)  # type: ignore[arg-type]
        waiting = sorted((one.waiting_since, i) for i, one in enumerate(connections) if one.waiting_since is not None)
        # In a crowd of half-sent requests the oldest goes first: an honest client is never the oldest.
        for since, i in waiting[: max(len(waiting) - self.server.limits.unfinished, 0)]:
            if now - since > NEW:
                connections[i].transport.abort()
        for one in connections:
            one.sweep(now)


def settle() -> None:
    """To be called when everything is loaded: the garbage collector need not look at what is there by now, and stays.

    Looking at all of torch takes 100 ms, in which no stream moves.
    """
    gc.collect()
    gc.freeze()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio switches Nagle's algorithm off, which costs 40 ms an answer, only where it sees TCP.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # What a client does not read stays with us, where it is bounded, and not in the kernel's megabytes.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    try:
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made
