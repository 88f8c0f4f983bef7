"""An offline batch: prompts of 8 to 64 tokens with outputs of 16 to 256, beside transformers' batched generate."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import Any

import bench_figures
import bench_model
import bench_peers
from bench_figures import alternate, beside
from bench_model import model_config, model_title, unlike_prompts
from bench_peers import transformers_or_none
from bench_remote import RemoteSides
from bench_sides import Side, our_sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_peers.add_arguments(parser)
    bench_figures.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config, dice = model_config(args), random.Random(2)
    prompts = unlike_prompts(config, args.prompts, dice)
    lengths = [min(dice.randint(16, 256), config.max_seq_len - 64) for _ in range(args.prompts)]
    longest = min(320, config.max_seq_len)
    with (
        transformers_or_none(args, args.prompts, longest, ["sdpa"]) as (peers, refused, folder),
        RemoteSides(our_sides, args, args.prompts, longest, args.batch_invariant, folder) as ours,
    ):
        sides: list[Side] = [*ours, *peers]
        runs = {side.name: partial(side.batch, prompts, lengths, len(prompts)) for side in sides}
        figures = alternate(runs, args.rounds)
    title = f"{args.prompts} prompts of 8 to 64 tokens, 16 to 256 new: {model_title(args)}"
    found = beside(title, figures, "output tok/s", args.max_spread, refused)
    return {"model": args.model or args.shape, "dtype": args.dtype, "prompts": args.prompts, **found}
