"""Other engines beside ours: which of them can run here, and whether they compute the same.

Each peer runs in a process of its own and reads the same folder of weights. A peer gets no ratio where it is missing,
or where its greedy tokens in fp32 are not ours: then it computes something else.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.llama_cpp import llama_cpp_missing, llama_cpp_sides
from benchmarks.model import BenchModel, random_prompt, weights_folder
from benchmarks.remote import RemoteSides
from benchmarks.sides import Ours, Side, transformers_missing, transformers_sides
from llama.config import EngineConfig
from llama.engine import Engine

CHECKED_PROMPTS = (3, 17, 64, 130)  # tokens of each
CHECKED_TOKENS = 8  # after each; random weights have near ties soon


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="without them a card holds larger models"
    )


@dataclass(frozen=True)
class Peer:
    """why_not: why it cannot run here, or None. start(dtype, sequences at a time, tokens of each): its sides.

    only: the subjects of `compare` that it can be measured in; None for all.
    """

    name: str
    why_not: str | None
    start: Callable[[str, int, int], RemoteSides]
    only: Sequence[str] | None = None


def transformers_peer(model: BenchModel, folder: Path, ways: Sequence[str] = ("eager", "sdpa")) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(transformers_sides, folder, dtype, model.device, model.threads, ways)

    return Peer("transformers", transformers_missing(), start)


def llama_cpp_peer(model: BenchModel, folder: Path, scratch: Path) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(llama_cpp_sides, folder, dtype, scratch, model.threads, n_seqs, context)

    why_not = "is measured on the CPU only" if model.device != "cpu" else llama_cpp_missing()
    return Peer("llama.cpp", why_not, start)


@contextmanager
def transformers_or_none(
    model: BenchModel, with_peers: bool, n_seqs: int, context: int, ways: Sequence[str] = ("eager", "sdpa")
) -> Iterator[tuple[list[Side], dict[str, str], Path | None]]:
    """What `peer_sides` gives for transformers alone, and the weights' folder; no folder without peers."""
    if not with_peers:
        yield [], {"transformers": "left out (--no-peers)"}, None
        return
    with weights_folder(model) as folder, ExitStack() as stack:
        peers = [transformers_peer(model, folder, ways)]
        yield *stack.enter_context(peer_sides(model, folder, peers, n_seqs, context)), folder


@contextmanager
def peer_sides(
    model: BenchModel, folder: Path, peers: Sequence[Peer], n_seqs: int, context: int
) -> Iterator[tuple[list[Side], dict[str, str]]]:
    """(sides that compute what ours does, {peer: why it is not a side}). The sides run until the block ends."""
    refused = {peer.name: peer.why_not for peer in peers if peer.why_not}
    present = [peer for peer in peers if peer.name not in refused]
    if present:
        refused |= other_tokens(model, folder, present)
    with ExitStack() as stack:
        sides: list[Side] = []
        for peer in present:
            if peer.name not in refused:
                sides += stack.enter_context(peer.start(model.dtype, n_seqs, context))
        yield sides, refused


def other_tokens(model: BenchModel, folder: Path, peers: Sequence[Peer]) -> dict[str, str]:
    """{peer: why it cannot be compared}: its greedy tokens after several prompts, in fp32, are not ours."""
    shape, dice = model.config, random.Random(8)
    lengths = [min(n, shape.max_seq_len - CHECKED_TOKENS) for n in CHECKED_PROMPTS]
    prompts = [random_prompt(shape, n, dice) for n in lengths]
    longest = max(lengths) + CHECKED_TOKENS
    config = EngineConfig(device=model.device, dtype="float32", slots=1, max_seq_len=longest)
    with Engine(folder, config, progress=False) as engine:
        expected = [Ours(engine).tokens(prompt, CHECKED_TOKENS) for prompt in prompts]
    refused: dict[str, str] = {}
    for peer in peers:
        with peer.start("float32", 1, longest) as sides:
            for prompt, ours_tokens in zip(prompts, expected, strict=True):
                for side in sides:
                    theirs = side.tokens(prompt, CHECKED_TOKENS)
                    refused = differing(peer.name, theirs, ours_tokens, len(prompt)) | refused
    return refused


def differing(name: str, tokens: list[int], ours: list[int], after: int) -> dict[str, str]:
    """{name: why} where tokens, those after a prompt of so many, are not ours."""
    for i, (theirs, expected) in enumerate(zip(tokens, ours, strict=True)):
        if theirs != expected:
            return {name: f"its greedy token {i} after {after} in fp32 is {theirs}, ours {expected}"}
    return {}
