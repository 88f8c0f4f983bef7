"""The model that a subject measures: its shape, its weights, engines of it, and random prompts for it."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kernels
from llama.cache import default_block_size
from llama.config import DTYPES, EngineConfig, ModelConfig
from llama.engine import Engine
from llama.request import SamplingParams
from llama.setup import find_model
from llama_slots.roofline import Format, kv_bytes, plain_format
from llama_slots.weights.source import HF, random_source
from llama_slots.weights.write import write_checkpoint

LONGEST_UNLIKE = 64  # tokens of a prompt
SHAPES = {
    "15M": ModelConfig(288, 6, 6, 6, 48, 768, 32000),
    "110M": ModelConfig(768, 12, 12, 12, 64, 2048, 32000),
    "1.1B": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000),
    "7B": ModelConfig.named("7B"),
    "13B": ModelConfig.named("13B"),
    "70B": ModelConfig.named("70B"),
}


@dataclass(frozen=True)
class BenchModel:
    """What is measured, and where. folder: a checkpoint, or 'demo', instead of random weights of `shape`.

    threads: of the process that computes. compile and batch_invariant: as in EngineConfig.
    """

    shape: str
    folder: str | None
    dtype: str
    device: str
    keep_weights: Path | None
    threads: int
    compile: bool = False
    batch_invariant: bool | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> BenchModel:
        """From the arguments of `add_model_arguments`, and of `add_mode_arguments` where the subject has them."""
        where = (args.shape, args.model, args.dtype, args.device, args.keep_weights, args.threads)
        return cls(*where, getattr(args, "compile", False), getattr(args, "batch_invariant", None))

    @property
    def name(self) -> str:
        return self.folder or self.shape

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}, {self.device}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a subject's figures say of the model."""
        return {"model": self.name, "dtype": self.dtype}

    @property
    def source(self) -> Path | ModelConfig:
        """A checkpoint's folder, or the shape of random weights. Raises ConfigError where there is no such folder."""
        return find_model(self.folder) if self.folder else SHAPES[self.shape]

    @property
    def config(self) -> ModelConfig:
        source = self.source
        return ModelConfig.from_dir(source) if isinstance(source, Path) else source

    @property
    def format(self) -> Format:
        """How weights and cache are kept, for the roofline."""
        dtype = getattr(torch, self.dtype)
        cached = kernels.cache_dtype(dtype, torch.device(self.device))
        return replace(plain_format(dtype.itemsize), kv_bytes=cached.itemsize)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
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


def add_mode_arguments(parser: argparse.ArgumentParser) -> None:
    """For subjects that run one engine in one mode."""
    parser.add_argument("--compile", action="store_true", help="EngineConfig.compile: on the CPU")
    parser.add_argument(
        "--batch-invariant", action=argparse.BooleanOptionalAction, help="default: the engine's own for the device"
    )


@contextmanager
def weights_folder(model: BenchModel) -> Iterator[Path]:
    """A folder with the model's weights, from which every engine reads the same ones.

    Random weights are written, and removed at the end unless `keep_weights` names a place for them.
    """
    if model.folder:
        yield find_model(model.folder)
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = (model.keep_weights or Path(scratch)) / f"random-{model.shape}-{model.dtype}"
        if not folder.exists():
            write_checkpoint(random_source(model.config, 0, None), folder, HF, model.dtype, None, False, False)
        yield folder


def make_engine(
    model: BenchModel,
    slots: int,
    max_seq_len: int,
    source: Path | ModelConfig | None = None,
    prefix_cache: bool = False,
    max_batch_seqs: int = 256,
    whole_card: bool = False,
) -> Engine:
    """An engine of the model. Prompts come again in every round, so its prefix cache is off unless that is the subject.

    whole_card: on CUDA, the KV cache takes all memory that is left, since nothing else runs there.
    """
    shape = source if isinstance(source, ModelConfig) else model.config
    config = EngineConfig(
        device=model.device,
        dtype=model.dtype,
        slots=slots,
        max_batch_seqs=max_batch_seqs,
        max_seq_len=max_seq_len,
        prefix_cache=prefix_cache,
        batch_invariant=model.batch_invariant,
        kv_memory=None if whole_card or model.device == "cpu" else _cache_bytes(shape, model, slots, max_seq_len),
        compile=model.compile,
    )
    return Engine(source or model.source, config, progress=False)


def _cache_bytes(shape: ModelConfig, model: BenchModel, slots: int, max_seq_len: int) -> int:
    """Of twice the slots' tokens and one block more, which is what an engine takes on the CPU."""
    size = default_block_size(torch.device(model.device).type)
    blocks = 1 + 2 * slots * -(-min(max_seq_len, shape.max_seq_len) // size)
    return blocks * size * kv_bytes(shape, model.format)


def greedy(n_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=n_tokens)


def random_prompt(config: ModelConfig, n: int, dice: random.Random) -> list[int]:
    return [1] + [dice.randrange(3, config.vocab_size) for _ in range(n - 1)]


def unlike_prompts(config: ModelConfig, count: int, dice: random.Random) -> list[list[int]]:
    """Of 8 to LONGEST_UNLIKE tokens."""
    return [random_prompt(config, dice.randint(8, LONGEST_UNLIKE), dice) for _ in range(count)]
