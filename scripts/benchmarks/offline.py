"""An offline batch: prompts of 8 to 64 tokens with outputs of 16 to 256, beside transformers' batched generate."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import Any

from benchmarks.figures import Repeats, add_round_arguments, alternate, beside
from benchmarks.model import BenchModel, add_mode_arguments, add_model_arguments, unlike_prompts
from benchmarks.peers import add_peer_arguments, transformers_or_none
from benchmarks.remote import RemoteSides
from benchmarks.sides import Side, our_sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    add_peer_arguments(parser)
    add_round_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(BenchModel.of(args), Repeats.of(args), args.peers, args.prompts)


def measure(model: BenchModel, repeats: Repeats, with_peers: bool, n_prompts: int) -> dict[str, Any]:
    config, dice = model.config, random.Random(2)
    prompts = unlike_prompts(config, n_prompts, dice)
    lengths = [min(dice.randint(16, 256), config.max_seq_len - 64) for _ in range(n_prompts)]
    longest = min(320, config.max_seq_len)
    with (
        transformers_or_none(model, with_peers, n_prompts, longest, ["sdpa"]) as (peers, refused, folder),
        RemoteSides(our_sides, model, n_prompts, longest, folder) as ours,
    ):
        sides: list[Side] = [*ours, *peers]
        runs = {side.name: partial(side.batch, prompts, lengths, len(prompts)) for side in sides}
        figures = alternate(runs, repeats.rounds)
    title = f"{n_prompts} prompts of 8 to 64 tokens, 16 to 256 new: {model.title}"
    ratios = beside(title, figures, "output tok/s", repeats.max_spread, refused)
    return {**model.facts, "prompts": n_prompts, **ratios}
