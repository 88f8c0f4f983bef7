"""What is measured: the shapes, random prompts, and engines made the same way by every subject."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from roofline import Format, kv_bytes, plain_format
from weights_source import HF, random_source
from weights_write import write_checkpoint

import kernels
from llama.cache import default_block_size
from llama.config import DTYPES, EngineConfig, ModelConfig
from llama.engine import Engine
from llama.request import SamplingParams
from llama.setup import find_model

LONGEST_UNLIKE = 64  # tokens of a prompt
SHAPES = {
    "15M": ModelConfig(288, 6, 6, 6, 48, 768, 32000),
    "110M": ModelConfig(768, 12, 12, 12, 64, 2048, 32000),
    "1.1B": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000),
    "7B": ModelConfig.named("7B"),
    "13B": ModelConfig.named("13B"),
    "70B": ModelConfig.named("70B"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="110M", help="random weights of this shape")
    parser.add_argument("--model", help="a checkpoint folder, or 'demo', instead of random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--keep-weights",
        type=Path,
        metavar="DIR",
        help="keep random weights that are written for peers here, or find them",
    )


def add_invariance(parser: argparse.ArgumentParser) -> None:
    """For subjects that run one engine in one mode."""
    parser.add_argument("--compile", action="store_true", help="EngineConfig.compile: on the CPU")
    parser.add_argument(
        "--batch-invariant", action=argparse.BooleanOptionalAction, help="default: the engine's own for the device"
    )


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_dir(find_model(args.model)) if args.model else SHAPES[args.shape]


def model_source(args: argparse.Namespace) -> Path | ModelConfig:
    """A checkpoint's folder, or the shape of random weights."""
    return find_model(args.model) if args.model else SHAPES[args.shape]


def model_title(args: argparse.Namespace) -> str:
    return f"{args.model or args.shape}, {args.dtype}, {args.device}"


def model_format(args: argparse.Namespace) -> Format:
    kept = getattr(torch, args.dtype)
    cached = kernels.cache_dtype(kept, torch.device(args.device))
    return replace(plain_format(kept.itemsize), kv_bytes=cached.itemsize)


@contextmanager
def weights_folder(args: argparse.Namespace) -> Iterator[Path]:
    """A folder of the weights for engines that are to have the same ones; random ones are written and removed again."""
    if args.model:
        yield find_model(args.model)
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        folder = (args.keep_weights or Path(made)) / f"random-{args.shape}-{args.dtype}"
        if not folder.exists():
            write_checkpoint(random_source(SHAPES[args.shape], 0, None), folder, HF, args.dtype, None, False, False)
        yield folder


def make_engine(
    args: argparse.Namespace,
    slots: int,
    max_seq_len: int,
    batch_invariant: bool | None,
    source: Path | ModelConfig | None = None,
    prefix_cache: bool = False,
    max_batch_seqs: int = 256,
    whole_card: bool = False,
) -> Engine:
    """Prompts come again in every round, so there is no prefix cache unless it is the subject.

    whole_card: on CUDA, a KV cache in all the memory that is left, not just for the slots: nothing else runs beside.
    """
    shape = source if isinstance(source, ModelConfig) else model_config(args)
    config = EngineConfig(
        device=args.device,
        dtype=args.dtype,
        slots=slots,
        max_batch_seqs=max_batch_seqs,
        max_seq_len=max_seq_len,
        prefix_cache=prefix_cache,
        batch_invariant=batch_invariant,
        kv_memory=None if whole_card or args.device == "cpu" else _cache_bytes(shape, args, slots, max_seq_len),
        compile=getattr(args, "compile", False),
    )
    return Engine(source or model_source(args), config, progress=False)


def _cache_bytes(shape: ModelConfig, args: argparse.Namespace, slots: int, max_seq_len: int) -> int:
    """Of twice the slots' tokens and one block more, which is what an engine takes on the CPU."""
    size = default_block_size(torch.device(args.device).type)
    blocks = 1 + 2 * slots * -(-min(max_seq_len, shape.max_seq_len) // size)
    return blocks * size * kv_bytes(shape, model_format(args))


def greedy(n_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=n_tokens)


def random_prompt(config: ModelConfig, n: int, dice: random.Random) -> list[int]:
    return [1] + [dice.randrange(3, config.vocab_size) for _ in range(n - 1)]


def unlike_prompts(config: ModelConfig, count: int, dice: random.Random) -> list[list[int]]:
    """Of 8 to LONGEST_UNLIKE tokens."""
    return [random_prompt(config, dice.randint(8, LONGEST_UNLIKE), dice) for _ in range(count)]
