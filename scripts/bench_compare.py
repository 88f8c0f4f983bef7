"""The same weights, prompts and lengths through ours and the peers, in turns: transformers, llama.cpp on the CPU, and
on a card gpt-fast (--gpt-fast DIR) and vLLM (--vllm), where they are asked for.

Subjects: decode of one sequence; 8 and 32 sequences that begin and end together (batch8, batch32), which suits static
batches best; the prefill of 512 tokens; and, when asked for, 8 and 32 requests in flight out of a queue of unlike ones
(mixed8, mixed32), as a server has them. transformers' `generate` takes those in batches of 8 or 32, as they come; its
continuous batching is a peer of its own. A peer whose greedy tokens in fp32 are not ours, on several prompts, computes
something else, and gets no ratio.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_engines
import bench_figures
import bench_model
import roofline_plot
from bench_continuous import continuous_peer
from bench_figures import alternate, beside
from bench_llama_cpp import llama_cpp_facts
from bench_machine import machine_title, measure_ceilings
from bench_model import (
    LONGEST_UNLIKE,
    model_config,
    model_format,
    model_title,
    random_prompt,
    unlike_prompts,
    weights_folder,
)
from bench_peers import llama_cpp_peer, peer_sides, transformers_peer
from bench_remote import RemoteSides
from bench_sides import Side, our_sides, transformers_facts
from roofline import Format, Work, decode_work, prefill_work, serving_work

from llama.config import ModelConfig

USUAL = ("decode", "batch8", "batch32", "prefill")
SUBJECTS = (*USUAL, "mixed8", "mixed32")  # a queue takes minutes
MIXED_REQUESTS = 4  # for each place in flight; the end, when places stay empty, is part of what is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_figures.add_arguments(parser)
    roofline_plot.add_arguments(parser)
    bench_engines.add_arguments(parser)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(USUAL))
    parser.add_argument(
        "--tokens",
        type=int,
        default=128,
        help="to decode, of each sequence; mixed ones get an eighth to twice as many",
    )
    parser.add_argument("--prompt-tokens", type=int, default=16, help="before the decoded ones")
    parser.add_argument("--prefill-tokens", type=int, default=512)


@dataclass(frozen=True)
class Subject:
    """run: a side's measurement. work: what `tokens` of it take at least, for the roofline."""

    run: Callable[[Side], Callable[[], float]]
    work: Work
    tokens: int


def subjects(args: argparse.Namespace, config: ModelConfig, kept: Format) -> dict[str, Subject]:
    dice, context = random.Random(4), args.prompt_tokens + args.tokens / 2
    prompts = [random_prompt(config, args.prompt_tokens, dice) for _ in range(32)]
    long = random_prompt(config, args.prefill_tokens, dice)

    def batch(n: int) -> Subject:
        lengths = [args.tokens] * n
        work = serving_work(config, kept, n, args.prompt_tokens, args.tokens)
        return Subject(lambda side: partial(side.batch, prompts[:n], lengths, n), work, sum(lengths))

    def mixed(n: int) -> Subject:
        unlike = unlike_prompts(config, MIXED_REQUESTS * n, dice)
        lengths = [dice.randint(max(1, args.tokens // 8), 2 * args.tokens) for _ in unlike]
        isl, osl = round(statistics.mean(map(len, unlike))), round(statistics.mean(lengths))
        work = serving_work(config, kept, n, isl, osl)
        return Subject(lambda side: partial(side.batch, unlike, lengths, n), work, n * osl)

    return {
        "decode": Subject(
            lambda side: partial(side.decode, prompts[0], args.tokens), decode_work(config, kept, 1, context), 1
        ),
        "batch8": batch(8),
        "batch32": batch(32),
        "prefill": Subject(lambda side: partial(side.prefill, long), prefill_work(config, kept, len(long)), len(long)),
        "mixed8": mixed(8),
        "mixed32": mixed(32),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    config, kept = model_config(args), model_format(args)
    longest = max(args.prompt_tokens + args.tokens, args.prefill_tokens + 1)
    if not set(args.subjects) <= set(USUAL):
        longest = max(longest, LONGEST_UNLIKE + 2 * args.tokens)
    versions = {"transformers": transformers_facts(), "llama.cpp": llama_cpp_facts()}
    found: dict[str, Any] = {"model": args.model or args.shape, "dtype": args.dtype, "peers": versions}
    points: list[roofline_plot.Point] = []
    before = measure_ceilings(args.device, args.dtype)
    with weights_folder(args) as folder, tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        peers = [
            transformers_peer(args, folder),
            continuous_peer(args, folder),
            llama_cpp_peer(args, folder, Path(scratch)),
            *bench_engines.asked_for(args, folder, Path(scratch)),
        ]
        peers = [peer for peer in peers if peer.only is None or set(peer.only) & set(args.subjects)]
        with (
            peer_sides(args, folder, peers, 32, longest) as (theirs, refused),
            RemoteSides(our_sides, args, 32, longest, args.batch_invariant, folder) as ours,
        ):
            sides: list[Side] = [*ours, *theirs]
            for name, subject in subjects(args, config, kept).items():
                if name not in args.subjects:
                    continue
                others = {
                    peer.name: f"is measured in {', '.join(peer.only)} only"
                    for peer in peers
                    if peer.only is not None and name not in peer.only
                }
                running = [side for side in sides if side.name.split()[0] not in others]
                figures = alternate({side.name: subject.run(side) for side in running}, args.rounds)
                found[name] = beside(
                    f"{name}: {model_title(args)}", figures, "tok/s", args.max_spread, others | refused
                )
                points += roofline_plot.points(name, figures, subject.work, subject.tokens, args.max_spread)
            after = measure_ceilings(args.device, args.dtype)
    ceilings = before.best(after)
    found["ceilings"] = ceilings.report()
    if args.plot and (moved := before.moved(after, args.max_spread)):
        print(f"no picture, for want of a steady roof: {moved}")
    elif args.plot:
        roofline_plot.draw(args.plot, model_title(args), machine_title(args.device), ceilings.card, points)
    return found
