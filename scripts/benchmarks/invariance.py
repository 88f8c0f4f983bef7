"""What batch_invariant=True costs: batch-1 decode and a batch of prompts, with and without it."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.figures import Repeats, add_round_arguments, alternate, beside
from benchmarks.model import LONGEST_UNLIKE, BenchModel, add_model_arguments, random_prompt, unlike_prompts
from benchmarks.remote import RemoteSides
from benchmarks.sides import our_sides

_NEW = 64  # tokens of each sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_round_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="of the sequence that runs alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(BenchModel.of(args), Repeats.of(args), args.prompts, args.prompt_tokens)


def measure(model: BenchModel, repeats: Repeats, n_prompts: int, prompt_tokens: int) -> dict[str, Any]:
    config, dice = model.config, random.Random(3)
    alone = [random_prompt(config, prompt_tokens, dice)]
    many = unlike_prompts(config, n_prompts, dice)
    report: dict[str, Any] = model.facts
    longest = max(prompt_tokens, LONGEST_UNLIKE) + _NEW
    with (
        RemoteSides(our_sides, replace(model, batch_invariant=True), n_prompts, longest) as (exact,),
        RemoteSides(our_sides, replace(model, batch_invariant=False), n_prompts, longest) as (fast,),
    ):
        for batch in (alone, many):
            lengths = [_NEW] * len(batch)
            sides = {
                "ours": partial(exact.batch, batch, lengths, len(batch)),
                "fast": partial(fast.batch, batch, lengths, len(batch)),
            }
            title = f"batch_invariant=True (ours) beside False (fast), {len(batch)} sequences: {model.title}"
            figures = alternate(sides, repeats.rounds)
            report[f"batch_{len(batch)}"] = beside(title, figures, "tok/s", repeats.max_spread)
    return report
