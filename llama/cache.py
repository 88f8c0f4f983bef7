"""`KVCache`: keys and values of every layer in fixed blocks. `MemoryPlan`: what fits, before anything is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import kernels
from llama.config import EngineConfig, ModelConfig
from llama.errors import ConfigError

# The cache's share of the memory that is free after weights and activations, unless kv_memory says otherwise.
_CUDA_SHARE = 0.92  # the rest is for the allocator's own rounding and other users
_CPU_SHARE = 0.25
GIB = 1 << 30


@dataclass(frozen=True)
class KVCache:
    """Zero-filled; block 0 stays zero. k, v: one for each layer, contiguous parts of `whole`."""

    whole: Tensor  # [n_layers, 2, num_blocks, block_size, n_kv_heads, head_dim]
    k: list[Tensor]  # [num_blocks, block_size, n_kv_heads, head_dim]
    v: list[Tensor]
    block_size: int

    @classmethod
    def empty(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (config.n_layers, 2, num_blocks, block_size, config.n_kv_heads, config.head_dim)
        whole = kernels.make_cache(shape, dtype, device)
        k, v = (list(half.unbind(0)) for half in whole.unbind(1))
        return cls(whole, k, v, block_size)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device. CUDA graphs and attention's partial sums use the share that the plan leaves free."""

    weights: int
    activations: int
    kv_block: int
    num_blocks: int
    block_size: int
    available: int

    @property
    def kv_cache(self) -> int:
        return self.kv_block * self.num_blocks

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache can hold; the pad block holds none."""
        return (self.num_blocks - 1) * self.block_size

    def __str__(self) -> str:
        return (
            f"memory: weights {self.weights / GIB:.2f} GiB, KV cache {self.kv_cache / GIB:.2f} GiB "
            f"({self.num_blocks} blocks of {self.block_size} tokens), activations {self.activations / GIB:.2f} GiB, "
            f"of {self.available / GIB:.2f} GiB available"
        )


def default_block_size(device_type: str) -> int:
    """Token positions of a block on 'cuda', whose attention reads keys in tiles of 64, or on 'cpu'.

    Small blocks leave less of a cached prompt to compute: the part behind its last full block.
    """
    return 64 if device_type == "cuda" else 16


def plan_memory(
    model: ModelConfig, engine: EngineConfig, max_seq_len: int, dtype: torch.dtype, device: torch.device
) -> MemoryPlan:
    """Divide the device's memory. Raises ConfigError when the weights or one full-length sequence cannot fit.

    dtype: of the weights. max_seq_len: the context that is served.
    """
    available, block_size = available_memory(device), engine.block_size or default_block_size(device.type)
    weights = (
        model.n_params * dtype.itemsize * (2 if engine.compile else 1)
    )  # compiled steps have a layout of their own
    widest = 4 * model.dim + model.q_dim + 2 * model.kv_dim + 3 * model.ffn_dim
    logit_rows = min(engine.max_batch_seqs, engine.max_batch_tokens)
    activations = engine.max_batch_tokens * widest * dtype.itemsize + 4 * logit_rows * model.vocab_size * 4
    kv_block = 2 * model.n_layers * block_size * model.kv_dim * kernels.cache_dtype(dtype, device).itemsize
    least = 1 + -(-max_seq_len // block_size)  # the pad block and one sequence of full length
    left = available - weights - activations
    if engine.kv_memory is not None:
        num_blocks = engine.kv_memory // kv_block
        if num_blocks < least:
            need = f"one sequence of {max_seq_len} tokens needs {least * kv_block} bytes"
            raise ConfigError("kv_memory", engine.kv_memory, f"{need}; lower max_seq_len or raise it")
        needed = weights + activations + engine.kv_memory
    else:
        share = _CUDA_SHARE if device.type == "cuda" else _CPU_SHARE
        # Twice the slots: requests with several choices, and room for prefixes that nobody holds at the moment.
        useful = 1 + 2 * engine.slots * -(-max_seq_len // block_size)
        fitting = int(left * share) // kv_block
        num_blocks = fitting if device.type == "cuda" else max(min(useful, fitting), least)
        needed = weights + activations + max(least, num_blocks) * kv_block
    if needed > available or num_blocks < least:
        raise ConfigError(
            "model",
            f"{model.n_params / 1e9:.2f}B parameters",
            f"needs {needed / GIB:.2f} GiB (weights {weights / GIB:.2f}, activations {activations / GIB:.2f}, KV cache "
            f"at least {least * kv_block / GIB:.2f}), {available / GIB:.2f} GiB are available",
        )
    return MemoryPlan(weights, activations, kv_block, num_blocks, block_size, available)


def available_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
