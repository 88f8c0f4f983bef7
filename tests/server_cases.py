"""What the tests of the HTTP endpoint stand on: a server in this process, and a raw client that can misbehave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import api
from api.http.app import App
from api.http.uvicorn_server import HttpServer, listen


@dataclass
class Serving:
    """A server that is being served. http: stop it with `http.stop()`."""

    app: App
    http: HttpServer
    thread: threading.Thread
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def at_rest(self) -> bool:
        """No connection is open, and every request is done and logged: its line comes after the client's answer."""
        state = self.http.server_state
        return not state.connections and not state.tasks


@contextmanager
def serving(client: api.AsyncClient | None, **options: Any) -> Iterator[Serving]:
    """Serve a client on a free port, until the block ends."""
    app = App(client, **options)
    http = HttpServer(app)
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=http.run, args=([sock],), name="http")
    thread.start()
    try:
        eventually(lambda: http.started)
        yield Serving(app, http, thread, port)
    finally:
        http.stop()
        http.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait until it holds; how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "it never became so"
        time.sleep(0.002)
    return time.monotonic() - started


@dataclass
class Answer:
    """An answer as it came over the wire. headers: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]

    @property
    def events(self) -> list[Any]:
        """Of a stream: the objects, and the word [DONE] at its end."""
        lines = self.body.decode().split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [one if one == "[DONE]" else json.loads(one) for one in data]


class Raw:
    """A connection that sends what it is told."""

    def __init__(self, port: int, timeout: float = 20.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.buffer = b""

    def send(self, data: bytes) -> Raw:
        self.socket.sendall(data)
        return self

    def read_until(self, mark: bytes) -> bytes:
        """What came up to and with the mark. Raises EOFError when the connection ends before."""
        while mark not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(self.buffer)
            self.buffer += data
        found, _, self.buffer = self.buffer.partition(mark)
        return found + mark

    def answer(self) -> Answer:
        """The next answer. Raises EOFError, OSError."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self.read_until(b"\r\n"), 16):
                self._fill(size + 2)
                body, self.buffer = body + self.buffer[:size], self.buffer[size + 2 :]
            self.read_until(b"\r\n")
        else:
            size = int(headers.get("content-length", "0"))
            self._fill(size)
            body, self.buffer = self.buffer[:size], self.buffer[size:]
        return Answer(int(first.split()[1]), headers, body)

    def closed(self) -> bool:
        """Whether the other side has closed, or does so soon."""
        try:
            return not self.buffer and not self.socket.recv(65536)
        except OSError:
            return True

    def reset(self) -> None:
        """Close with RST, as a client does that crashes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, size: int) -> None:
        while len(self.buffer) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(self.buffer)
            self.buffer += data


def post(path: str, body: Any, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of a POST request. body: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        **(headers or {}),
    }
    return head("POST", path, lines) + data


def get(path: str, headers: dict[str, str] | None = None) -> bytes:
    return head("GET", path, {"Host": "127.0.0.1", **(headers or {})})


def head(method: str, path: str, lines: dict[str, str]) -> bytes:
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value != "")
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1")


def ask(port: int, request: bytes) -> Answer:
    """One request on a connection of its own."""
    with Raw(port) as raw:
        return raw.send(request).answer()
