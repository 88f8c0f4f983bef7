"""What batch_invariant=True costs: batch-1 decode and a batch of prompts, with and without it."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import Any

import bench_figures
import bench_model
from bench_figures import alternate, beside
from bench_model import LONGEST_UNLIKE, model_config, model_title, random_prompt, unlike_prompts
from bench_remote import RemoteSides
from bench_sides import our_sides

_NEW = 64  # tokens of each sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_figures.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="of the sequence that runs alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config, dice = model_config(args), random.Random(3)
    alone = [random_prompt(config, args.prompt_tokens, dice)]
    many = unlike_prompts(config, args.prompts, dice)
    found: dict[str, Any] = {"model": args.model or args.shape, "dtype": args.dtype}
    longest = max(args.prompt_tokens, LONGEST_UNLIKE) + _NEW
    with (
        RemoteSides(our_sides, args, args.prompts, longest, True) as (exact,),
        RemoteSides(our_sides, args, args.prompts, longest, False) as (fast,),
    ):
        for batch in (alone, many):
            lengths = [_NEW] * len(batch)
            sides = {
                "ours": partial(exact.batch, batch, lengths, len(batch)),
                "fast": partial(fast.batch, batch, lengths, len(batch)),
            }
            title = f"batch_invariant=True (ours) beside False (fast), {len(batch)} sequences: {model_title(args)}"
            figures = alternate(sides, args.rounds)
            found[f"batch_{len(batch)}"] = beside(title, figures, "tok/s", args.max_spread)
    return found
