"""The server under load, on 127.0.0.1, in a process of its own; each figure beside what it is compared with.

overhead: 256 streams whose tokens cost nothing to compute, over HTTP and in process, in turns, both on one core, with
the HTTP client on another. refusals: 1,000 requests at once on 30 slots. load: a real model, closed loop
(--concurrency), and with --trace as the file says, open loop.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import api
from api.http.app import App
from api.http.limits import HttpLimits
from api.http.uvicorn_server import HttpServer, listen, settle
from benchmarks import http_load as load
from benchmarks.fake_runner import FakeRunner
from benchmarks.figures import OURS, Figure, Repeats, add_round_arguments, alternate, why_not

PARTS = ("overhead", "refusals", "load")
NAME = "bench"
STREAMS, SLOTS, SOCKETS = 256, 30, 1000
ANSWER = 200  # tokens of an answer beside which others are refused
CHAT = "/v1/chat/completions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="demo", help="a checkpoint folder, or demo")
    add_round_arguments(parser)
    parser.add_argument("--tokens", type=int, default=400, help="overhead: tokens of a stream")
    parser.add_argument(
        "--step-ms", type=float, nargs="+", default=[0.0, 20.0], help="overhead: how long a step takes, for each run"
    )
    parser.add_argument("--concurrency", type=int, default=16, help="load: requests at a time in the closed loop")
    parser.add_argument("--requests", type=int, default=200, help="load: requests of the closed loop")
    parser.add_argument("--trace", type=Path, help="load: an Azure LLM inference trace (CSV), replayed in an open loop")
    parser.add_argument("--rate", type=float, default=1.0, help="load: how many times as fast as the trace")
    parser.add_argument("--seconds", type=float, default=60.0, help="load: how much of it, after --rate")


@dataclass(frozen=True)
class Load:
    """What the part `load` sends. trace: a file to replay, `rate` times as fast, the first `seconds` of that."""

    requests: int
    concurrency: int
    trace: Path | None
    rate: float
    seconds: float


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts asked for; prints a table for each."""
    allow_sockets()
    sent = Load(args.requests, args.concurrency, args.trace, args.rate, args.seconds)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": lambda: overhead(args.model, Repeats.of(args), args.tokens, args.step_ms),
        "refusals": lambda: refusals(args.model),
        "load": lambda: under_load(args.model, sent),
    }
    return {name: parts[name]() for name in args.parts}


# --- the other process -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What is served. step: seconds of a step that computes nothing; None: the model itself. core: to stay on."""

    model: str
    slots: int
    step: float | None = None
    core: int | None = None


def make_client(options: Options) -> api.AsyncClient:
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    client = api.AsyncClient(options.model, served_name=NAME, slots=options.slots)
    if options.step is not None:
        served = client.served.find()
        words = [i for i, text in enumerate(served.tokenizer.vocabulary.texts) if text]
        served.engine._loop.runner = FakeRunner(words, options.step)
    settle()  # on both sides of a comparison
    return client


def serve(pipe: Connection, options: Options) -> None:
    """Sends (port, context, vocabulary size), then serves until the other end says stop, or is gone."""
    allow_sockets()
    client = make_client(options)
    # Everybody connects before the first one speaks, which to a server looks like a crowd of half-sent requests.
    http = HttpServer(App(client, slots=options.slots, limits=HttpLimits(unfinished=2 * SOCKETS)))
    listening = listen("127.0.0.1", 0)
    listening.listen(SOCKETS)  # so that whoever hears of the port may connect
    engine = client.served.find().engine
    pipe.send((listening.getsockname()[1], engine.max_seq_len, engine.model_config.vocab_size))

    def wait() -> None:
        with suppress(EOFError):
            pipe.recv()
        http.stop()
        http.stop()

    threading.Thread(target=wait, daemon=True).start()
    http.run([listening])
    asyncio.run(client.close())


def answer_in_process(pipe: Connection, options: Options) -> None:
    """For every request's fields that come: as many as there are slots at once on one event loop; sends tokens per
    second."""
    client = make_client(options)

    async def answer(fields: dict[str, Any]) -> int:
        tokens = 0
        async for chunk in await client.chat.completions.create(**fields):
            tokens += chunk.usage.completion_tokens if chunk.usage else 0
        return tokens

    async def all_of_them(fields: dict[str, Any]) -> float:
        started = time.perf_counter()
        tokens = await asyncio.gather(*(answer(fields) for _ in range(options.slots)))
        return sum(tokens) / (time.perf_counter() - started)

    pipe.send(None)
    while (fields := pipe.recv()) is not None:
        pipe.send(asyncio.run(all_of_them(fields)))
    asyncio.run(client.close())


@contextmanager
def child(target: Callable[[Connection, Options], None], options: Options) -> Iterator[tuple[Connection, Any]]:
    """Run `target` in a process of its own until the block ends. Gives the pipe to it, and what it sent first."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, options), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours, ours.recv()
        ours.send(None)
    finally:
        ours.close()
        process.join(20)
        if process.is_alive():
            process.kill()


def allow_sockets() -> None:
    """As many open sockets as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Stay on one core inside the block."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- the parts ---------------------------------------------------------------------------------------------------


def chat_fields(max_tokens: int) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def two_cores() -> tuple[int, int] | tuple[None, None]:
    """A core for this process and one for the server; nothing where they must share."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[1], cores[0]) if len(cores) > 1 else (None, None)


def overhead(model: str, repeats: Repeats, tokens: int, step_ms: list[float]) -> dict[str, Any]:
    """Tokens per second of 256 streams of so many tokens, over HTTP beside in process."""
    own_core, server_core = two_cores()
    if own_core is None:
        print("only one core: the server shares it with the client", file=sys.stderr)
    fields = chat_fields(tokens)
    requests = [load.request_bytes(CHAT, fields)] * STREAMS
    report: dict[str, Any] = {"streams": STREAMS, "tokens": tokens, "own_core": own_core is not None}
    print(
        f"{'ms/step':>8} {'in process':>11} {'over HTTP':>10} {'ratio':>6} {'spread':>7}   tokens/s, {STREAMS} streams"
    )
    for ms in step_ms:
        options = Options(model, STREAMS, ms / 1000, server_core)
        with child(serve, options) as (_, (port, *_)), child(answer_in_process, options) as (pipe, _), pinned(own_core):

            def in_process(pipe: Connection = pipe) -> float:
                pipe.send(fields)
                return pipe.recv()

            def over_http(port: int = port) -> float:
                shots, seconds, _ = asyncio.run(load.all_at_once(port, requests))
                assert all((shot.status, shot.tokens) == (200, tokens) for shot in shots)
                return STREAMS * tokens / seconds

            sides = alternate({OURS: over_http, "in process": in_process}, repeats.rounds)
        report[f"step_{ms:g}_ms"] = http_line(ms, sides, repeats.max_spread)
    return report


def http_line(ms: float, sides: Mapping[str, Figure], max_spread: float) -> dict[str, Any]:
    """A line of the table, with the reason in place of the ratio where there is none, and the same by name."""
    local, http = sides["in process"], sides[OURS]
    ratio, reason = http.over(local), why_not(sides, "in process", max_spread)
    told = reason or f"{ratio.median:>6.2f} {ratio.spread:>7.0%}"
    print(f"{ms:>8g} {local.median:>11.0f} {http.median:>10.0f} {told}")
    medians: dict[str, Any] = {"in_process": round(local.median), "http": round(http.median)}
    return medians | (
        {"refused": reason} if reason else {"ratio": round(ratio.median, 3), "spread": round(ratio.spread, 3)}
    )


def refusals(model: str) -> dict[str, Any]:
    """How long a request waits for its 429, when 1,000 come at once on 30 slots and steps take 20 ms."""
    own_core, server_core = two_cores()
    requests = [load.request_bytes(CHAT, chat_fields(ANSWER))] * SOCKETS
    with child(serve, Options(model, SLOTS, 0.02, server_core)) as (_, (port, *_)), pinned(own_core):
        at_once, _, cpu = asyncio.run(load.all_at_once(port, requests))
        # One after the other while the slots are full: what a refusal costs without 970 others in a queue before it.
        alone = asyncio.run(one_by_one(port, requests[0]))
    statuses = Counter(shot.status for shot in at_once)
    crowd = load.percentiles([shot.seconds for shot in at_once if shot.status == 429], 50, 99)
    single = load.percentiles([shot.seconds for shot in alone], 50, 99)
    answer = statistics.median(shot.seconds for shot in at_once if shot.status == 200)
    share = crowd["p99"] / 1000 / answer
    print(f"{len(requests)} requests at once on {SLOTS} slots: {statuses[200]} answered, {statuses[429]} refused (429)")
    print(f"a refusal took p50 {crowd['p50']} ms, p99 {crowd['p99']} ms among all; p50 {single['p50']} ms alone")
    print(f"an answer took {answer:.2f} s (median), so the p99 of a refusal is {share:.1%} of one")
    print(f"the load generator itself worked for {cpu * 1000:.0f} ms, beside the server where there are two cores")
    return {
        "answered": statuses[200],
        "refused": statuses[429],
        "ms_at_once": crowd,
        "ms_alone": single,
        "answer_s": round(answer, 2),
        "p99_share_of_answer": round(share, 4),
        "generator_cpu_s": round(cpu, 3),
    }


async def one_by_one(port: int, request: bytes, count: int = 200) -> list[load.Shot]:
    """Refusals, each on a new connection, while the slots are taken."""
    holders = [asyncio.create_task(load.fire(await load.connect(port), request)) for _ in range(SLOTS)]
    await asyncio.sleep(0.5)
    shots = [await load.fire(await load.connect(port), request) for _ in range(count)]
    await asyncio.gather(*holders)
    return [shot for shot in shots if shot.status == 429]


def under_load(model: str, sent: Load) -> dict[str, Any]:
    """A real model: latencies and throughput in a closed loop, and of a trace in an open one."""
    report: dict[str, Any] = {"model": model}
    dice = random.Random(4)
    print(
        f"{'loop':>7} {'sent':>5} {'served':>6} {'429':>5} {'other':>5} {'tok/s':>7}   ms: first token | between events"
    )
    with child(serve, Options(model, SLOTS)) as (_, (port, context, vocab_size)):

        def request(prompt_tokens: int, answer_tokens: int) -> bytes:
            prompt = [dice.randrange(3, vocab_size) for _ in range(prompt_tokens)]
            options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
            fields = {"model": NAME, "prompt": prompt, "max_tokens": answer_tokens, **options}
            return load.request_bytes("/v1/completions", fields)

        lengths = [(dice.randint(8, 64), dice.randint(16, 64)) for _ in range(sent.requests)]
        requests = [request(*pair) for pair in lengths]
        report["closed"] = summary("closed", *asyncio.run(load.closed_loop(port, requests, sent.concurrency)))
        report["closed"]["concurrency"] = sent.concurrency
        if sent.trace is not None:
            trace = load.read_trace(sent.trace, sent.seconds, sent.rate, context)
            arrivals = [(a.at, request(a.prompt_tokens, a.answer_tokens)) for a in trace]
            report["trace"] = summary("trace", *asyncio.run(load.open_loop(port, arrivals)))
            report["trace"] |= {"rate": sent.rate, "file": sent.trace.name}
    return report


def summary(loop: str, shots: list[load.Shot], seconds: float) -> dict[str, Any]:
    """A line of the table, and the same figures by name."""
    statuses = Counter(shot.status for shot in shots)
    good = [shot for shot in shots if shot.status == 200]
    first = load.percentiles([shot.first for shot in good if shot.first is not None], 50, 95, 99)
    gaps = load.percentiles([gap for shot in good for gap in shot.gaps], 50, 95, 99)
    rate = sum(shot.tokens for shot in good) / seconds
    other = len(shots) - statuses[200] - statuses[429]
    print(
        f"{loop:>7} {len(shots):>5} {len(good):>6} {statuses[429]:>5} {other:>5} {rate:>7.0f}   "
        f"{' '.join(f'{name} {value}' for name, value in first.items())} | "
        f"{' '.join(f'{name} {value}' for name, value in gaps.items())}"
    )
    return {
        "sent": len(shots),
        "served": len(good),
        "refused": statuses[429],
        "other": other,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(rate, 1),
        "requests_per_s": round(len(good) / seconds, 2),
        "ttft_ms": first,
        "inter_token_ms": gaps,
    }
