"""All slots busy: the time between a request's tokens, and to its first, as each of them sees it.

A closed loop in this process: a new request starts whenever one ends. Prompts have one length and answers many, so
that prompts are computed between the others' tokens. The first requests start together; the wait of the last of them
for its first token is a figure of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Figure, Repeats, add_round_arguments
from benchmarks.http_load import percentiles
from benchmarks.model import BenchModel, add_mode_arguments, add_model_arguments, greedy, make_engine, random_prompt
from llama.engine import Engine
from llama.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    add_round_arguments(parser)
    parser.add_argument("--slots", type=int, default=30)
    parser.add_argument("--requests", type=int, default=90, help="of one round, those that come first included")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, from half to one and a half times that")


@dataclass
class Seen:
    """Seconds of one round. burst: to the first token of the requests that came at once; first: of the later ones."""

    burst: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    taken: float = 0.0
    tokens: int = 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    sizes = (args.slots, args.requests, args.prompt_tokens, args.tokens)
    return measure(BenchModel.of(args), Repeats.of(args), *sizes)


def measure(
    model: BenchModel, repeats: Repeats, slots: int, n_requests: int, prompt_tokens: int, tokens: int
) -> dict[str, Any]:
    config, dice = model.config, random.Random(9)
    requests = [
        Request(
            [random_prompt(config, prompt_tokens, dice)],
            greedy(max(2, dice.randint(tokens // 2, tokens * 3 // 2))),
        )
        for _ in range(n_requests)
    ]
    with make_engine(model, slots, prompt_tokens + tokens * 3 // 2) as engine:
        asyncio.run(closed_loop(engine, requests[:slots], slots))
        rounds = [asyncio.run(closed_loop(engine, requests, slots)) for _ in range(repeats.rounds)]
    about = f"{slots} slots, {prompt_tokens} tokens in, about {tokens} out"
    print(f"{about}, {n_requests} requests a round: {model.title}")
    return {**model.facts, "slots": slots} | summary(rounds, repeats.max_spread)


async def closed_loop(engine: Engine, requests: list[Request], slots: int) -> Seen:
    """Run the requests, `slots` of them at a time."""
    seen, waiting = Seen(), iter(enumerate(requests))
    started = time.perf_counter()
    await asyncio.gather(*(_one_after_the_other(engine, waiting, slots, seen) for _ in range(slots)))
    seen.taken = time.perf_counter() - started
    return seen


async def _one_after_the_other(engine: Engine, waiting: Iterator[tuple[int, Request]], slots: int, seen: Seen) -> None:
    for number, request in waiting:
        last = time.perf_counter()
        firsts = seen.burst if number < slots else seen.first
        fresh = True
        async for delta in engine.submit(request, wait=True):
            now = time.perf_counter()
            (firsts if fresh else seen.gaps).append(now - last)
            seen.tokens += len(delta.token_ids)
            last, fresh = now, False


def summary(rounds: list[Seen], max_spread: float) -> dict[str, Any]:
    """The median over the rounds of each figure; those that varied too much are refused."""
    figures = {
        "inter_token_ms_p50": Figure([percentiles(seen.gaps, 50)["p50"] for seen in rounds]),
        "inter_token_ms_p99": Figure([percentiles(seen.gaps, 99)["p99"] for seen in rounds]),
        "output_tok_s": Figure([seen.tokens / seen.taken for seen in rounds]),
        "burst_last_first_token_ms": Figure([max(seen.burst) * 1e3 for seen in rounds]),
    }
    if all(seen.first for seen in rounds):
        figures["first_token_ms_p50"] = Figure([percentiles(seen.first, 50)["p50"] for seen in rounds])
        figures["first_token_ms_p99"] = Figure([percentiles(seen.first, 99)["p99"] for seen in rounds])
    report: dict[str, Any] = {"refused": {}}
    for name, figure in figures.items():
        if noise := figure.noise(max_spread):
            report["refused"][name] = noise
            print(f"  {name:26} {noise}")
        else:
            report[name] = round(figure.median, 2)
            print(f"  {name:26} {figure.median:>10.2f} ({figure.steadiness})")
    return report
