"""The server's meter: what it reads of answers and traces, and each of its parts once, with small numbers."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks import http_load as load
from benchmarks import serve as bench_serve

EVENT = b'data: {"choices": []}\n\n'
USAGE = b'data: {"usage": {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def fired_at(pieces: Sequence[bytes], stay: bool = False) -> load.Shot:
    """What a request finds that is answered with these pieces, one after the other. stay: then stay connected."""
    over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        if stay:
            await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        over.set()

    async def one() -> load.Shot:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, asyncio.timeout(20):
            port = server.sockets[0].getsockname()[1]
            shot = await load.fire(await load.connect(port), load.request_bytes("/", {}))
            await over.wait()
            return shot

    return asyncio.run(one())


def test_a_stream_is_timed_event_by_event() -> None:
    shot = fired_at([STREAM + chunk(EVENT), chunk(EVENT + EVENT), chunk(USAGE), chunk(DONE), b"0\r\n\r\n"], stay=True)
    assert (shot.status, shot.tokens) == (200, 12)
    assert shot.first is not None
    assert len(shot.gaps) == 2  # what comes together counts once, and the end is no event
    assert 0 < shot.first < shot.first + sum(shot.gaps) <= shot.seconds


def test_a_stream_may_come_in_any_pieces() -> None:
    data = STREAM + chunk(EVENT) + chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n"
    for size in (19, 64, len(data)):
        shot = fired_at([data[i : i + size] for i in range(0, len(data), size)], stay=True)
        assert (shot.status, shot.tokens) == (200, 12)


def test_a_refusal_is_over_when_its_body_is_there() -> None:
    """Whether the connection stays or not."""
    for stay in (True, False):
        shot = fired_at([REFUSED[:-1], REFUSED[-1:]], stay)
        assert (shot.status, shot.first, shot.gaps, shot.tokens) == (429, None, [], 0)
        assert shot.seconds > 0


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"HTTP/1.1 200 OK\r\n"],
        [REFUSED[:-1]],
        [STREAM],
        [STREAM + chunk(EVENT)],
        [STREAM + chunk(EVENT), b"0\r\n\r\n"],
    ],
    ids=["nothing", "half a head", "half a body", "no event", "half a stream", "no mark at its end"],
)
def test_what_breaks_off_has_no_status(pieces: list[bytes]) -> None:
    shot = fired_at(pieces)
    assert (shot.status, shot.tokens) == (0, 0)


def test_a_trace_is_cut_to_its_time_and_scaled_to_the_context(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,1800,200\n"
        "2023-11-16 18:15:51.6805900,3,1\n"
        "2023-11-16 18:16:06.6805900,9000,9000\n"
    )

    def read(seconds: float, rate: float, context: int) -> list[tuple[float, int, int]]:
        trace = load.read_trace(tmp_path / "trace.csv", seconds, rate, context)
        return [(one.at, one.prompt_tokens, one.answer_tokens) for one in trace]

    # The longest of those in time fills the context, less the two that a request needs besides.
    assert read(10, 1, 1002) == [(0, 187, 22), (4, 900, 100), (5, 1, 1)]
    assert read(10, 1, 5000) == [(0, 374, 44), (4, 1800, 200), (5, 3, 1)]
    assert [at for at, *_ in read(10, 4, 5000)] == [0, 1, 1.25, 5]
    assert len(read(4, 1, 5000)) == 1


@pytest.mark.parametrize("n_requests", [0, 1, 5, 7])
def test_a_closed_loop_sends_each_request_once(n_requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than so many at a time, whoever is ready first."""
    flying, most, sent = 0, 0, []

    async def connect(port: int) -> Any:
        await asyncio.sleep(0)

    async def fire(connection: Any, request: bytes) -> load.Shot:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        sent.append(request)
        await asyncio.sleep(0)
        flying -= 1
        return load.Shot(200)

    monkeypatch.setattr(load, "connect", connect)
    monkeypatch.setattr(load, "fire", fire)
    requests = [b"%d" % i for i in range(n_requests)]
    shots, _ = asyncio.run(load.closed_loop(1, requests, 3))
    assert (len(shots), sorted(sent)) == (n_requests, requests)
    assert most == min(3, n_requests)


def test_percentiles_are_ranks_in_milliseconds() -> None:
    values = [i / 1000 for i in range(100, 0, -1)]
    assert load.percentiles(values, 50, 95, 99) == {"p50": 51, "p95": 96, "p99": 100}
    assert load.percentiles([0.25], 50, 99) == {"p50": 250, "p99": 250}
    assert load.percentiles([], 50) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "keys"), [("overhead", {"step_0_ms"}), ("refusals", {"answer_s"}), ("load", {"trace"})]
)
def test_each_part_runs(
    part: str, keys: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, small in {"STREAMS": 4, "SLOTS": 3, "SOCKETS": 40, "ANSWER": 60}.items():
        monkeypatch.setattr(bench_serve, name, small)
    trace = tmp_path / "trace.csv"
    rows = (f"2023-11-16 18:15:4{i}.6805900,{20 + i},{3 + i}" for i in range(5))
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    parser = argparse.ArgumentParser()
    bench_serve.add_arguments(parser)
    options = [
        "--parts",
        part,
        "--rounds",
        "3",
        "--max-spread",
        "99",
        "--tokens",
        "20",
        "--step-ms",
        "0",
        "--concurrency",
        "2",
    ]
    options += ["--requests", "6", "--trace", str(trace), "--rate", "10", "--seconds", "9"]
    found: dict[str, Any] = bench_serve.run(parser.parse_args(options))[part]
    assert keys <= set(found)
    if part == "overhead":
        assert found["step_0_ms"]["ratio"] > 0
    elif part == "refusals":
        assert found["answered"] >= 3
        assert found["answered"] + found["refused"] == 40
        assert found["p99_share_of_answer"] == pytest.approx(found["ms_at_once"]["p99"] / 1000 / found["answer_s"], 0.1)
    else:
        assert (found["closed"]["served"], found["closed"]["other"]) == (6, 0)
        assert (found["trace"]["sent"], found["trace"]["other"]) == (5, 0)
        assert set(found["closed"]["ttft_ms"]) == {"p50", "p95", "p99"}
    assert capsys.readouterr().out
