"""What the prefix cache costs where nothing is found in it, and what it brings where a whole prompt is."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.figures import OURS, Repeats, add_round_arguments, alternate, beside
from benchmarks.model import BenchModel, add_mode_arguments, add_model_arguments, random_prompt
from benchmarks.remote import RemoteSides
from benchmarks.sides import Side, our_sides

REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    add_round_arguments(parser)
    parser.add_argument("--prompts", type=int, default=32, help="unrelated ones, for the cost")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the prompt that comes again")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(BenchModel.of(args), Repeats.of(args), args.prompts, args.prompt_tokens)


def measure(model: BenchModel, repeats: Repeats, n_prompts: int, prompt_tokens: int) -> dict[str, Any]:
    config, dice = model.config, random.Random(6)
    again = random_prompt(config, prompt_tokens, dice)
    options = (model, n_prompts, prompt_tokens + 64, None)
    with (
        RemoteSides(our_sides, *options, True) as (cached,),
        RemoteSides(our_sides, *options, False) as (plain,),
    ):

        def unrelated(side: Side) -> Callable[[], float]:
            """New prompts in every run, the same ones for either engine."""
            own_dice = random.Random(7)
            return lambda: side.batch(
                [random_prompt(config, 64, own_dice) for _ in range(n_prompts)], [32] * n_prompts, n_prompts
            )

        # Fill the cache as a server's is after a while: every block was used, and the oldest prefix must make room.
        filling = [random_prompt(config, prompt_tokens + 63, dice) for _ in range(2 * n_prompts)]
        for side in (cached, plain):
            side.batch(filling, [1] * len(filling), n_prompts)
        cost = alternate({OURS: unrelated(cached), "without": unrelated(plain)}, repeats.rounds)
        gain = alternate(
            {OURS: partial(repeated, cached, again), "without": partial(repeated, plain, again)}, repeats.rounds
        )
    no_hits, all_cached = f"{n_prompts} unrelated prompts", f"a prompt of {len(again)} tokens again"
    return {
        **model.facts,
        "no_hits": beside(f"{no_hits}: {model.title}", cost, "output tok/s", repeats.max_spread),
        "all_cached": beside(f"{all_cached}: {model.title}", gain, "tok/s to the first", repeats.max_spread),
    }


def repeated(side: Side, prompt: list[int]) -> float:
    """The median of several, since one of a cached prompt takes some milliseconds."""
    return statistics.median(side.prefill(prompt) for _ in range(REPEATS))
