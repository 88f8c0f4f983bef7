"""What the prefix cache costs where nothing is found in it, and what it brings where a whole prompt is."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_figures
import bench_model
from bench_figures import OURS, alternate, beside
from bench_model import model_config, model_title, random_prompt
from bench_remote import RemoteSides
from bench_sides import Side, our_sides

REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_figures.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=32, help="unrelated ones, for the cost")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the prompt that comes again")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config, dice = model_config(args), random.Random(6)
    again = random_prompt(config, args.prompt_tokens, dice)
    options = (args, args.prompts, args.prompt_tokens + 64, args.batch_invariant, None)
    with (
        RemoteSides(our_sides, *options, True) as (cached,),
        RemoteSides(our_sides, *options, False) as (plain,),
    ):

        def unrelated(side: Side) -> Callable[[], float]:
            """New prompts in every run, the same ones for either engine."""
            own = random.Random(7)
            return lambda: side.batch(
                [random_prompt(config, 64, own) for _ in range(args.prompts)], [32] * args.prompts, args.prompts
            )

        # As a server is after a while: every block of the cache was used before, and the oldest prefix makes room.
        filling = [random_prompt(config, args.prompt_tokens + 63, dice) for _ in range(2 * args.prompts)]
        for side in (cached, plain):
            side.batch(filling, [1] * len(filling), args.prompts)
        cost = alternate({OURS: unrelated(cached), "without": unrelated(plain)}, args.rounds)
        gain = alternate(
            {OURS: partial(repeated, cached, again), "without": partial(repeated, plain, again)}, args.rounds
        )
    title = model_title(args)
    return {
        "model": args.model or args.shape,
        "dtype": args.dtype,
        "no_hits": beside(f"{args.prompts} unrelated prompts: {title}", cost, "output tok/s", args.max_spread),
        "all_cached": beside(
            f"a prompt of {len(again)} tokens again: {title}", gain, "tok/s to the first", args.max_spread
        ),
    }


def repeated(side: Side, prompt: list[int]) -> float:
    """The median of several, since one of a cached prompt takes some milliseconds."""
    return statistics.median(side.prefill(prompt) for _ in range(REPEATS))
