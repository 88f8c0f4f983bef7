"""The same weights, prompts and lengths through ours, transformers and llama.cpp, in turns.

Subjects: decode of one sequence, 8 and 32 sequences at once, the prefill of 512 tokens. A peer whose first greedy
tokens in fp32 are not ours computes something else, and gets no ratio.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import bench_figures
import bench_model
from bench_figures import alternate, beside
from bench_llama_cpp import llama_cpp_missing, llama_cpp_sides
from bench_model import make_engine, model_config, model_title, random_prompt, weights_folder
from bench_remote import RemoteSides
from bench_sides import Ours, Side, transformers_missing, transformers_sides

from llama.config import EngineConfig
from llama.engine import Engine

SUBJECTS = ("decode", "batch8", "batch32", "prefill")
CHECKED_TOKENS = 8  # of random weights, which have near ties soon


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_figures.add_arguments(parser)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--tokens", type=int, default=128, help="to decode, of each sequence")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="before the decoded ones")
    parser.add_argument("--prefill-tokens", type=int, default=512)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config, dice = model_config(args), random.Random(4)
    prompts = [random_prompt(config, args.prompt_tokens, dice) for _ in range(32)]
    long = random_prompt(config, args.prefill_tokens, dice)
    runs: dict[str, Callable[[Side], Callable[[], float]]] = {
        "decode": lambda side: partial(side.decode, prompts[0], args.tokens),
        "batch8": lambda side: partial(side.batch, prompts[:8], [args.tokens] * 8),
        "batch32": lambda side: partial(side.batch, prompts, [args.tokens] * 32),
        "prefill": lambda side: partial(side.prefill, long),
    }
    found: dict[str, Any] = {"model": args.model or args.shape, "dtype": args.dtype}
    with weights_folder(args) as folder, tempfile.TemporaryDirectory(prefix="bench-") as scratch, ExitStack() as stack:
        refused = other_tokens(folder, Path(scratch), prompts[0], args)
        longest = max(args.prompt_tokens + args.tokens, args.prefill_tokens + 1)
        sides: list[Side] = [
            Ours(stack.enter_context(make_engine(args, 32, longest, args.batch_invariant, folder))),
            *stack.enter_context(RemoteSides(transformers_sides, folder, args.dtype, args.device, args.threads)),
        ]
        if "llama.cpp" not in refused:
            theirs = (folder, args.dtype, Path(scratch), args.threads, 32, longest)
            sides += stack.enter_context(RemoteSides(llama_cpp_sides, *theirs))
        sides = [side for side in sides if side.name.split()[0] not in refused]
        for subject in args.subjects:
            figures = alternate({side.name: runs[subject](side) for side in sides}, args.rounds)
            title = f"{subject}: {model_title(args)}"
            found[subject] = beside(title, figures, "tok/s", args.max_spread, refused)
    return found


def other_tokens(folder: Path, scratch: Path, prompt: list[int], args: argparse.Namespace) -> dict[str, str]:
    """Peers that cannot be compared, and why: missing here, or with other tokens than ours in fp32."""
    refused = transformers_missing()
    if args.device != "cpu":
        refused["llama.cpp"] = "is measured on the CPU only"
    elif reason := llama_cpp_missing():
        refused["llama.cpp"] = reason
    with Engine(folder, EngineConfig(device=args.device, dtype="float32", slots=1), progress=False) as engine:
        ours = Ours(engine).tokens(prompt, CHECKED_TOKENS)
    with RemoteSides(transformers_sides, folder, "float32", args.device, args.threads, ["sdpa"]) as sides:
        for side in sides:
            refused |= differing("transformers", side.tokens(prompt, CHECKED_TOKENS), ours)
    if "llama.cpp" not in refused:
        with RemoteSides(llama_cpp_sides, folder, "float32", scratch, args.threads, 1, 128) as sides:
            refused |= differing("llama.cpp", sides[0].tokens(prompt, CHECKED_TOKENS), ours)
    return refused


def differing(name: str, tokens: list[int], ours: list[int]) -> dict[str, str]:
    """{name: why} where tokens are not ours."""
    for i, (theirs, own) in enumerate(zip(tokens, ours, strict=True)):
        if theirs != own:
            return {name: f"its greedy token {i} in fp32 is {theirs}, ours {own}"}
    return {}
