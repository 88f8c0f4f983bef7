"""The same weights, prompts and lengths through ours and the peers, in turns: transformers, llama.cpp on the CPU, and
on a card gpt-fast (--gpt-fast DIR) and vLLM (--vllm), where they are asked for.

Subjects: decode of one sequence; 8 and 32 sequences that begin and end together (batch8, batch32), which suits static
batches best; the prefill of 512 tokens; and, when asked for, 8 and 32 requests in flight out of a queue of unlike ones
(mixed8, mixed32), as a server has them. transformers' `generate` takes those in batches of 8 or 32, in order; its
continuous batching is a peer of its own. A peer gets no ratio if its greedy tokens in fp32 differ from ours on any of
several prompts.
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

from benchmarks import roofline_plot
from benchmarks.card_peers import CardPeers, add_card_peer_arguments, asked_for
from benchmarks.continuous import continuous_peer
from benchmarks.figures import Repeats, add_round_arguments, alternate, beside
from benchmarks.llama_cpp import llama_cpp_facts
from benchmarks.machine import machine_title, measure_ceilings
from benchmarks.model import (
    LONGEST_UNLIKE,
    BenchModel,
    add_mode_arguments,
    add_model_arguments,
    random_prompt,
    unlike_prompts,
    weights_folder,
)
from benchmarks.peers import Peer, llama_cpp_peer, peer_sides, transformers_peer
from benchmarks.remote import RemoteSides
from benchmarks.sides import Side, our_sides, transformers_facts
from llama.config import ModelConfig
from llama_slots.roofline import Format, Work, decode_work, prefill_work, serving_work

USUAL = ("decode", "batch8", "batch32", "prefill")
SUBJECTS = (*USUAL, "mixed8", "mixed32")  # a queue takes minutes
MIXED_REQUESTS = 4  # for each place in flight; the end, when places stay empty, is part of what is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    add_round_arguments(parser)
    roofline_plot.add_plot_argument(parser)
    add_card_peer_arguments(parser)
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
class Sizes:
    """Tokens: before the decoded ones, decoded by each sequence, and of the long prompt."""

    prompt: int
    decoded: int
    prefill: int


@dataclass(frozen=True)
class Subject:
    """run: a side's measurement. work: the least that `tokens` of it take, for the roofline."""

    run: Callable[[Side], Callable[[], float]]
    work: Work
    tokens: int


def subjects(sizes: Sizes, config: ModelConfig, kept: Format) -> dict[str, Subject]:
    dice, context = random.Random(4), sizes.prompt + sizes.decoded / 2
    prompts = [random_prompt(config, sizes.prompt, dice) for _ in range(32)]
    long = random_prompt(config, sizes.prefill, dice)

    def batch(n: int) -> Subject:
        lengths = [sizes.decoded] * n
        work = serving_work(config, kept, n, sizes.prompt, sizes.decoded)
        return Subject(lambda side: partial(side.batch, prompts[:n], lengths, n), work, sum(lengths))

    def mixed(n: int) -> Subject:
        unlike = unlike_prompts(config, MIXED_REQUESTS * n, dice)
        lengths = [dice.randint(max(1, sizes.decoded // 8), 2 * sizes.decoded) for _ in unlike]
        isl, osl = round(statistics.mean(map(len, unlike))), round(statistics.mean(lengths))
        work = serving_work(config, kept, n, isl, osl)
        return Subject(lambda side: partial(side.batch, unlike, lengths, n), work, n * osl)

    return {
        "decode": Subject(
            lambda side: partial(side.decode, prompts[0], sizes.decoded), decode_work(config, kept, 1, context), 1
        ),
        "batch8": batch(8),
        "batch32": batch(32),
        "prefill": Subject(lambda side: partial(side.prefill, long), prefill_work(config, kept, len(long)), len(long)),
        "mixed8": mixed(8),
        "mixed32": mixed(32),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    sizes = Sizes(args.prompt_tokens, args.tokens, args.prefill_tokens)
    return measure(BenchModel.of(args), Repeats.of(args), CardPeers.of(args), args.subjects, sizes, args.plot)


def measure(
    model: BenchModel, repeats: Repeats, named: CardPeers, wanted: list[str], sizes: Sizes, plot: Path | None
) -> dict[str, Any]:
    """Measure the subjects that are wanted. named: peers besides those that are always tried. plot: where to draw."""
    longest = max(sizes.prompt + sizes.decoded, sizes.prefill + 1)
    if not set(wanted) <= set(USUAL):
        longest = max(longest, LONGEST_UNLIKE + 2 * sizes.decoded)
    versions = {"transformers": transformers_facts(), "llama.cpp": llama_cpp_facts()}
    report: dict[str, Any] = {**model.facts, "peers": versions}
    points: list[roofline_plot.Point] = []
    before = measure_ceilings(model.device, model.dtype)
    with weights_folder(model) as folder, tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        peers = [
            transformers_peer(model, folder),
            continuous_peer(model, folder),
            llama_cpp_peer(model, folder, Path(scratch)),
            *asked_for(named, model.device, folder, Path(scratch)),
        ]
        peers = [peer for peer in peers if peer.only is None or set(peer.only) & set(wanted)]
        with (
            peer_sides(model, folder, peers, 32, longest) as (theirs, refused),
            RemoteSides(our_sides, model, 32, longest, folder) as ours,
        ):
            sides: list[Side] = [*ours, *theirs]
            for name, subject in subjects(sizes, model.config, model.format).items():
                if name not in wanted:
                    continue
                others = left_out(peers, name)
                running = [side for side in sides if side.name.split()[0] not in others]
                figures = alternate({side.name: subject.run(side) for side in running}, repeats.rounds)
                title = f"{name}: {model.title}"
                report[name] = beside(title, figures, "tok/s", repeats.max_spread, others | refused)
                points += roofline_plot.points(name, figures, subject.work, subject.tokens, repeats.max_spread)
            after = measure_ceilings(model.device, model.dtype)
    ceilings = before.best(after)
    report["ceilings"] = ceilings.report()
    if plot and (moved := before.moved(after, repeats.max_spread)):
        print(f"no picture, for want of a steady roof: {moved}")
    elif plot:
        roofline_plot.draw(plot, model.title, machine_title(model.device), ceilings.card, points)
    return report


def left_out(peers: list[Peer], subject: str) -> dict[str, str]:
    """{peer: why it is not measured in this subject}."""
    return {
        peer.name: f"is measured in {', '.join(peer.only)} only"
        for peer in peers
        if peer.only is not None and subject not in peer.only
    }
