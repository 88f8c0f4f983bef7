"""All slots busy: the time between a request's tokens, and to its first, as each of them sees it.

A closed loop in this process: as soon as one request has ended, the next takes its place, with prompts of one length
and answers of many, so that prompts come in between the others' tokens. The first requests come all at once; what the
last of them waits for its first token is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import bench_figures
import bench_model
from bench_figures import Figure
from bench_load import percentiles
from bench_model import greedy, make_engine, model_config, model_title, random_prompt

from llama.engine import Engine
from llama.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_figures.add_arguments(parser)
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
    config, dice = model_config(args), random.Random(9)
    work = [
        Request(
            [random_prompt(config, args.prompt_tokens, dice)],
            greedy(max(2, dice.randint(args.tokens // 2, args.tokens * 3 // 2))),
        )
        for _ in range(args.requests)
    ]
    longest = args.prompt_tokens + args.tokens * 3 // 2
    with make_engine(args, args.slots, longest, args.batch_invariant) as engine:
        asyncio.run(closed_loop(engine, work[: args.slots], args.slots))
        rounds = [asyncio.run(closed_loop(engine, work, args.slots)) for _ in range(args.rounds)]
    about = f"{args.slots} slots, {args.prompt_tokens} tokens in, about {args.tokens} out"
    print(f"{about}, {args.requests} requests a round: {model_title(args)}")
    return {"model": args.model or args.shape, "dtype": args.dtype, "slots": args.slots} | summary(args, rounds)


async def closed_loop(engine: Engine, work: list[Request], slots: int) -> Seen:
    """Run the requests, `slots` of them at a time."""
    seen, waiting = Seen(), iter(enumerate(work))
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


def summary(args: argparse.Namespace, rounds: list[Seen]) -> dict[str, Any]:
    """The middle of the rounds for each figure; those that varied too much are refused."""
    figures = {
        "inter_token_ms_p50": Figure([percentiles(seen.gaps, 50)["p50"] for seen in rounds]),
        "inter_token_ms_p99": Figure([percentiles(seen.gaps, 99)["p99"] for seen in rounds]),
        "output_tok_s": Figure([seen.tokens / seen.taken for seen in rounds]),
        "burst_last_first_token_ms": Figure([max(seen.burst) * 1e3 for seen in rounds]),
    }
    if all(seen.first for seen in rounds):
        figures["first_token_ms_p50"] = Figure([percentiles(seen.first, 50)["p50"] for seen in rounds])
        figures["first_token_ms_p99"] = Figure([percentiles(seen.first, 99)["p99"] for seen in rounds])
    found: dict[str, Any] = {"refused": {}}
    for name, figure in figures.items():
        if noise := figure.noise(args.max_spread):
            found["refused"][name] = noise
            print(f"  {name:26} {noise}")
        else:
            found[name] = round(figure.median, 2)
            print(f"  {name:26} {figure.median:>10.2f} ({figure.steadiness})")
    return found
