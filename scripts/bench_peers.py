"""Other engines beside ours: who can run here, and whether they compute the same.

Each peer runs in a process of its own, with the weights of the folder that ours reads. One whose greedy tokens in fp32
are not ours computes something else, and gets no ratio; nor does one that is missing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_llama_cpp import llama_cpp_missing, llama_cpp_sides
from bench_model import model_config, random_prompt, weights_folder
from bench_remote import RemoteSides
from bench_sides import Ours, Side, transformers_missing, transformers_sides

from llama.config import EngineConfig
from llama.engine import Engine

CHECKED_PROMPTS = (3, 17, 64, 130)  # tokens of each
CHECKED_TOKENS = 8  # after each; random weights have near ties soon


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="without them a card holds larger models"
    )


@dataclass(frozen=True)
class Peer:
    """why_not: it cannot run here, or None. start(dtype, sequences at a time, tokens of each): its sides.

    only: the subjects of `compare` that it can be measured in; None for all.
    """

    name: str
    why_not: str | None
    start: Callable[[str, int, int], RemoteSides]
    only: Sequence[str] | None = None


def transformers_peer(args: argparse.Namespace, folder: Path, ways: Sequence[str] = ("eager", "sdpa")) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(transformers_sides, folder, dtype, args.device, args.threads, ways)

    return Peer("transformers", transformers_missing(), start)


def llama_cpp_peer(args: argparse.Namespace, folder: Path, scratch: Path) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(llama_cpp_sides, folder, dtype, scratch, args.threads, n_seqs, context)

    why_not = "is measured on the CPU only" if args.device != "cpu" else llama_cpp_missing()
    return Peer("llama.cpp", why_not, start)


@contextmanager
def transformers_or_none(
    args: argparse.Namespace, n_seqs: int, context: int, ways: Sequence[str] = ("eager", "sdpa")
) -> Iterator[tuple[list[Side], dict[str, str], Path | None]]:
    """What `peer_sides` gives for transformers alone, and the weights' folder; no folder with --no-peers."""
    if not args.peers:
        yield [], {"transformers": "left out (--no-peers)"}, None
        return
    with weights_folder(args) as folder, ExitStack() as stack:
        peers = [transformers_peer(args, folder, ways)]
        yield *stack.enter_context(peer_sides(args, folder, peers, n_seqs, context)), folder


@contextmanager
def peer_sides(
    args: argparse.Namespace, folder: Path, peers: Sequence[Peer], n_seqs: int, context: int
) -> Iterator[tuple[list[Side], dict[str, str]]]:
    """(sides that compute what ours does, {peer: why it is none}), the sides until the block ends."""
    refused = {peer.name: peer.why_not for peer in peers if peer.why_not}
    present = [peer for peer in peers if peer.name not in refused]
    if present:
        refused |= other_tokens(args, folder, present)
    with ExitStack() as stack:
        sides: list[Side] = []
        for peer in present:
            if peer.name not in refused:
                sides += stack.enter_context(peer.start(args.dtype, n_seqs, context))
        yield sides, refused


def other_tokens(args: argparse.Namespace, folder: Path, peers: Sequence[Peer]) -> dict[str, str]:
    """{peer: why it cannot be compared}: its greedy tokens after several prompts, in fp32, are not ours."""
    config, dice = model_config(args), random.Random(8)
    lengths = [min(n, config.max_seq_len - CHECKED_TOKENS) for n in CHECKED_PROMPTS]
    prompts = [random_prompt(config, n, dice) for n in lengths]
    longest = max(lengths) + CHECKED_TOKENS
    engine = EngineConfig(device=args.device, dtype="float32", slots=1, max_seq_len=longest)
    with Engine(folder, engine, progress=False) as ours:
        expected = [Ours(ours).tokens(prompt, CHECKED_TOKENS) for prompt in prompts]
    refused: dict[str, str] = {}
    for peer in peers:
        with peer.start("float32", 1, longest) as sides:
            for prompt, own in zip(prompts, expected, strict=True):
                for side in sides:
                    refused = differing(peer.name, side.tokens(prompt, CHECKED_TOKENS), own, len(prompt)) | refused
    return refused


def differing(name: str, tokens: list[int], ours: list[int], after: int) -> dict[str, str]:
    """{name: why} where tokens, those after a prompt of so many, are not ours."""
    for i, (theirs, own) in enumerate(zip(tokens, ours, strict=True)):
        if theirs != own:
            return {name: f"its greedy token {i} after {after} in fp32 is {theirs}, ours {own}"}
    return {}
