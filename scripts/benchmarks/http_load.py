"""Load over HTTP: streamed requests, each timed, sent all at once, in a closed loop or at the times of a trace."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Shot:
    """One request and its outcome; all times in seconds. status: of HTTP, 0 when the connection broke.

    first: until the first event. gaps: between events that came one after the other. tokens: generated, by the answer.
    """

    status: int = 0
    seconds: float = 0.0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: when, in seconds from the first, and its lengths in tokens."""

    at: float
    prompt_tokens: int
    answer_tokens: int


def read_trace(path: Path, seconds: float, rate: float, context: int) -> list[Arrival]:
    """The first `seconds` of an Azure trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), `rate` times as fast.

    Lengths are scaled by one factor, so that the longest of these requests fills the context.
    """
    with path.open(newline="") as file:
        rows = [
            # Seven digits of a second are one more than Python reads.
            (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    since = [((at - rows[0][0]).total_seconds() / rate, prompt, answer) for at, prompt, answer in rows]
    kept = [row for row in since if row[0] < seconds]
    scale = min((context - 2) / max(prompt + answer for _, prompt, answer in kept), 1.0)
    return [Arrival(at, max(int(prompt * scale), 1), max(int(answer * scale), 1)) for at, prompt, answer in kept]


def request_bytes(path: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    lines = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return lines.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port)


async def fire(connection: Connection, request: bytes) -> Shot:
    """Send a request and read its answer to the end. Keeps nothing of a stream but its last bytes."""
    reader, writer = connection
    shot, started = Shot(), time.perf_counter()
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"content-length: *(\d+)", head, re.IGNORECASE):
            body = await reader.readexactly(int(length[1]))
        else:
            body = await read_stream(reader, shot, started)
        shot.status = int(head.split(None, 2)[1])
        if counts := re.findall(rb'"completion_tokens": ?(\d+)', body):
            shot.tokens = int(counts[-1])
    except (OSError, EOFError):
        pass  # the status stays 0
    finally:
        writer.close()
    shot.seconds = time.perf_counter() - started
    with suppress(OSError):
        await writer.wait_closed()
    return shot


async def read_stream(reader: asyncio.StreamReader, shot: Shot, started: float) -> bytes:
    """The last bytes of a stream, whose event times go into `shot`. Raises EOFError when it has no proper end."""
    tail, last = b"", started
    while not tail.endswith(b"\r\n0\r\n\r\n") and (data := await reader.read(1 << 16)):
        if b"data: {" in data:
            now = time.perf_counter()
            if shot.first is None:
                shot.first = now - started
            else:
                shot.gaps.append(now - last)
            last = now
        tail = (tail + data)[-2048:]
    if b"data: [DONE]" not in tail:
        raise EOFError("the stream was cut off")
    return tail


async def all_at_once(port: int, requests: Sequence[bytes]) -> tuple[list[Shot], float, float]:
    """Send every request on a connection that is open before; returns the seconds from the first byte to the last, and
    the CPU seconds of this process."""
    connections = [await connect(port) for _ in requests]
    started, cpu = time.perf_counter(), time.process_time()
    shots = await asyncio.gather(*map(fire, connections, requests))
    return shots, time.perf_counter() - started, time.process_time() - cpu


async def closed_loop(port: int, requests: Sequence[bytes], concurrency: int) -> tuple[list[Shot], float]:
    """`concurrency` requests at a time; a new one starts whenever one ends."""
    left, shots = list(reversed(requests)), []

    async def work() -> None:
        while left:
            request = left.pop()  # before the first await: the others take from it as well
            shots.append(await fire(await connect(port), request))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return shots, time.perf_counter() - started


async def open_loop(port: int, arrivals: Sequence[tuple[float, bytes]]) -> tuple[list[Shot], float]:
    """Send each request at its time, whatever became of those before. A refused one is not sent again."""
    started = time.perf_counter()

    async def send(at: float, request: bytes) -> Shot:
        await asyncio.sleep(max(started + at - time.perf_counter(), 0))
        return await fire(await connect(port), request)

    shots = await asyncio.gather(*(send(at, request) for at, request in arrivals))
    return shots, time.perf_counter() - started


def percentiles(values: Sequence[float], *shares: int) -> dict[str, float]:
    """In milliseconds, by name: p50, p99 and so on; empty when there is nothing to rank."""
    ranked = sorted(values)
    return {
        f"p{share}": round(ranked[min(len(ranked) * share // 100, len(ranked) - 1)] * 1000, 2)
        for share in shares
        if ranked
    }
