"""`ManyRows`: steps of several rows on the CPU, with a few layers at a time compiled into one function.

oneDNN multiplies, as on the plain path. What lies between two multiplications is a loop or two, and attention reads the
cache in place (`kernels.attend_blocks`). A token of a short prompt is treated as a sequence that ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import CpuPlan, QueryBlocks, attend_blocks, packed_linear
from llama.batch import Batch, LastStep, Step
from llama.cache import KVCache
from llama.cpu.compile import compile_isolated, group_layers, rms_norm, rotate, swiglu
from llama.model import Block, Transformer, layer

# With more tokens to a block, most of what is computed for short sequences would be thrown away.
MAX_BLOCK_SIZE = 64
# Keys that all tokens of a step's prompts may see, in whole blocks; the plain path is quicker with more.
_PROMPT_KEYS = 8192
# All rows are padded to the longest block list. Refuse a step that merges more blocks than so many times the keys seen.
_MAX_PADDING = 4
_MAX_BLOCKS = 4096  # of one sequence; Inductor would compile longer sums anew


class ManyRows:
    """Constructing it compiles, under torch.inference_mode (`OneRow`)."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._layers = compile_isolated(_layers_of(model), _is_size, any_threads=True)
        self._head = compile_isolated(_head_of(model), _is_size, any_threads=True)
        cached = iter([(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(cache.k, cache.v, strict=True)])
        groups = group_layers(model.blocks, lambda matrix: matrix.data)
        self._groups = [(weights, list(islice(cached, len(weights)))) for weights in groups]
        self._compile()

    def _compile(self) -> None:
        """Once, for all numbers of rows and of blocks from 2 on."""
        n_rows, n_blocks, size = 31, 5, self.cache.block_size
        lengths = np.full(n_rows, n_blocks * size, np.int32)
        blocks = QueryBlocks.plan(lengths, np.ones((n_rows, n_blocks), np.int32), size)
        positions, kv_index = torch.zeros(n_rows, dtype=torch.long), torch.full((n_rows,), size)
        logit_rows = torch.zeros(n_rows - 1, dtype=torch.long)
        x = torch.zeros((n_rows, self.model.config.dim))  # gives keys and values of 0, which is what the cache holds
        for tensor in (x, positions, kv_index, logit_rows, *blocks):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(blocks.tables, 1)
        weights, cached = self._groups[0]
        x = self._layers(x, weights, self.model.cos_sin, positions, kv_index, cached, blocks)[0]
        torch._dynamo.mark_dynamic(x, 0)
        self._head(x, logit_rows, self.model.norm, self.model.lm_head.data)

    def serves(self, step: Step) -> bool:
        """Whether the step has several rows, whose tokens the host knows, yields a token, and has no long prompt."""
        if step.n_rows < 2 or not step.sampled or len(step.unread) or step.prompt_spans:
            return False
        size = self.cache.block_size
        ends, counts = step.seqlens_k.astype(np.int64), np.diff(step.cu_seqlens_q)
        keys = _keys_in_blocks(ends, size) - _keys_in_blocks(ends - counts, size)
        n_blocks = -(-int(ends.max()) // size)
        if keys[counts > 1].sum() > _PROMPT_KEYS or n_blocks > _MAX_BLOCKS:
            return False
        return bool(step.n_rows * n_blocks <= _MAX_PADDING * keys.sum())

    def run(self, step: Step, last: LastStep | None) -> Tensor:
        """Logits [sequences that yield a token, vocab_size] fp32."""
        model, n_sampled = self.model, len(step.sampled)
        # One row would be compiled for on its own.
        logit_rows = step.sampled_rows if n_sampled > 1 else step.sampled_rows.repeat(2)
        batch = Batch.of(step, logit_rows, model.embedding.device, last)
        assert isinstance(batch.attention, CpuPlan)
        blocks = batch.attention.blocks
        x = F.embedding(batch.token_ids, model.embedding).float()
        for weights, cached in self._groups:
            x = self._layers(x, weights, model.cos_sin, batch.positions, batch.kv_index, cached, blocks)[0]
        logits: Tensor = self._head(x, batch.logit_rows, model.norm, model.lm_head.data)
        return logits[:n_sampled]


def _keys_in_blocks(n_tokens: np.ndarray, size: int) -> np.ndarray:
    """Keys that the first n_tokens of a sequence see, all together, in whole blocks."""
    whole, rest = np.divmod(n_tokens, size)
    return size * (size * whole * (whole + 1) // 2 + rest * (whole + 1))


def _is_size(name: str, guard_type: str) -> bool:
    """Sizes may change: others in the process may call `torch.compiler.reset()`, and then functions are compiled anew
    for the first ones that come."""
    return guard_type == "SHAPE_ENV" or name in ("x", "rows", "blocks.rows", "blocks.tables")


def _layers_of(model: Transformer) -> Callable[..., tuple[Tensor, ...]]:
    """Some layers. x: [rows, dim] fp32. cos_sin: the model's. positions, kv_index: [rows] int64. cached: keys and
    values of each layer, as rows of the cache; written in place. Returns x and what Inductor is to store."""
    config = model.config
    head_dim, scale, sizes = config.head_dim, config.head_dim**-0.5, [config.q_dim, config.kv_dim, config.kv_dim]
    norm, multiply = partial(rms_norm, eps=config.norm_eps), _multiply_of(model)

    def layers(
        x: Tensor,
        weights: list[Block[Tensor]],
        cos_sin: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        cached: list[tuple[Tensor, Tensor]],
        blocks: QueryBlocks,
    ) -> tuple[Tensor, ...]:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
        stored: list[Tensor] = []

        def attend(keys: Tensor, values: Tensor, qkv: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split(sizes, -1))
            keys.index_put_((kv_index,), rotate(k, cos, sin))
            values.index_put_((kv_index,), v)
            attended, parts = attend_blocks(rotate(q, cos * scale, sin * scale), keys, values, blocks)
            stored.extend(parts)
            return attended.flatten(1)

        for block, (keys, values) in zip(weights, cached, strict=True):
            h, residual = layer(block, x, None, norm, multiply, partial(attend, keys, values), swiglu)
            x = residual + h
        return x, *stored

    return layers


def _head_of(model: Transformer) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    eps, multiply = model.config.norm_eps, _multiply_of(model)

    def head(x: Tensor, rows: Tensor, weight: Tensor, lm_head: Tensor) -> Tensor:
        return multiply(rms_norm(x[rows], weight, eps)[0], lm_head)

    return head


def _multiply_of(model: Transformer) -> Callable[[Tensor, Tensor], Tensor]:
    """(x fp32, `data` of a LinearWeight) -> their product in fp32, multiplied in the model's dtype."""
    dtype, block = model.embedding.dtype, model.blocks[0]
    matrices = (block.qkv_proj, block.o_proj, block.gate_up_proj, block.down_proj, model.lm_head)
    # A traced tensor does not tell its layout, but all matrices of one shape have the same.
    blocked = {(matrix.n, matrix.k) for matrix in matrices if matrix.blocked}

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        product = packed_linear if tuple(weight.shape) in blocked else F.linear
        return product(x.to(dtype), weight).float()

    return multiply
