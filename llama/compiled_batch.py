"""`CompiledBatch`: steps of several rows on the CPU, with a few layers at a time compiled into one function.

oneDNN multiplies, as on the plain path; what lies between two multiplications is a loop or two, and attention reads
the cache where it lies (`kernels.block_attention`), where the plain path copies the keys of short sequences together.
Short prompts go the same way, beside sequences that decode or alone, each token as a sequence that ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import LinearWeight, QueryBlocks, attend_blocks, packed_linear
from llama.batch import Batch
from llama.cache import KVCache
from llama.compiled import compile_apart, norm, rotate, weights_of_calls
from llama.model import Transformer
from llama.scheduler import Plan

# Keys that all tokens of a step's prompts may see, in whole blocks: 120 tokens of one prompt, or 10 behind 800. With 7
# sequences beside, a step of 110M took 36 ms instead of 43 with such a prompt, and 20.4 instead of 21.4 with 20 tokens
# behind 600.
_PROMPT_KEYS = 8192
# With more tokens to a block, most of what is computed for short sequences would be thrown away.
MOST_BLOCK_SIZE = 64
# Every token that is computed puts as many blocks together as the one with most has: at most so many times the keys
# that are seen. 30 tokens of a prompt beside a sequence of 2000 keys and 6 short ones, 1.6 times, took 20 ms, not 28.
_TOGETHER = 4
_MOST_BLOCKS = 4096  # of one sequence; Inductor would compile longer sums anew

# (x, weights of each layer, cos_sin, positions, kv_index, keys and values of each, blocks) -> x, what is to be stored
Layers = Callable[
    [Tensor, list[list[Tensor]], Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]], QueryBlocks], tuple[Tensor, ...]
]


class CompiledBatch:
    """Constructing it compiles, for some seconds to half a minute, under torch.inference_mode (`CompiledRow`)."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._layers: Layers = compile_apart(_layers_of(model), _is_size, any_threads=True)
        self._head = compile_apart(_head_of(model), _is_size, any_threads=True)
        cached = iter([(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(cache.k, cache.v, strict=True)])
        calls = weights_of_calls(model.blocks, lambda matrix: matrix.data)
        self._calls = [(weights, list(islice(cached, len(weights)))) for weights in calls]
        self._compile()

    def _compile(self) -> None:
        """Once, for all numbers of rows and of blocks from 2 on."""
        n_rows, n_blocks, size = 31, 5, self.cache.block_size
        lengths = np.full(n_rows, n_blocks * size, np.int32)
        blocks = QueryBlocks.plan(lengths, np.ones((n_rows, n_blocks), np.int32), size)
        positions, kv_index = torch.zeros(n_rows, dtype=torch.long), torch.full((n_rows,), size)
        wanted = torch.zeros(n_rows - 1, dtype=torch.long)
        x = torch.zeros((n_rows, self.model.config.dim))  # gives keys and values of 0, which is what the cache holds
        for tensor in (x, positions, kv_index, wanted, *blocks):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(blocks.tables, 1)
        weights, cached = self._calls[0]
        x = self._layers(x, weights, self.model.cos_sin, positions, kv_index, cached, blocks)[0]
        torch._dynamo.mark_dynamic(x, 0)
        self._head(x, wanted, self.model.norm, self.model.lm_head.data)

    def serves(self, plan: Plan) -> bool:
        """Whether the plan has several rows, whose tokens the host knows, yields a token, and has no long prompt."""
        if not any(plan.yields) or plan.n_tokens < 2:
            return False
        size, most, n_blocks, n_prompt_blocks = self.cache.block_size, 0, 0, 0
        for seq, first, count in zip(plan.seqs, plan.firsts, plan.counts, strict=True):
            if first + count > len(seq.token_ids):
                return False
            blocks = _blocks_seen(first + count, size) - _blocks_seen(first, size)
            most, n_blocks = max(most, (first + count - 1) // size + 1), n_blocks + blocks
            n_prompt_blocks += blocks if count > 1 else 0
            if n_prompt_blocks * size > _PROMPT_KEYS:
                return False
        return most <= _MOST_BLOCKS and plan.n_tokens * most <= _TOGETHER * n_blocks * size

    def run(self, plan: Plan) -> Tensor:
        """Logits [sequences that yield a token, vocab_size] fp32."""
        model = self.model
        ends = accumulate(plan.counts)
        wanted = [end - 1 for end, yields in zip(ends, plan.yields, strict=True) if yields]
        twice = wanted * 2 if len(wanted) == 1 else wanted  # one row would be compiled for on its own
        batch = Batch.from_plan(plan, twice, self.cache.block_size, model.embedding.device)
        assert batch.attention.cpu is not None
        blocks = batch.attention.cpu.blocks
        x = F.embedding(batch.token_ids, model.embedding).float()
        for weights, cached in self._calls:
            x = self._layers(x, weights, model.cos_sin, batch.positions, batch.kv_index, cached, blocks)[0]
        logits: Tensor = self._head(x, batch.logit_rows, model.norm, model.lm_head.data)
        return logits[: len(wanted)]


def _blocks_seen(n_tokens: int, size: int) -> int:
    """By the first tokens of a sequence, all together."""
    whole, rest = divmod(n_tokens, size)
    return size * whole * (whole + 1) // 2 + rest * (whole + 1)


def _is_size(name: str, guard_type: str) -> bool:
    """Of what guards check, sizes may change: after a `torch.compiler.reset()`, which others in the process may call,
    functions are compiled anew for the first ones that come."""
    return guard_type == "SHAPE_ENV" or name in ("x", "rows", "blocks.rows", "blocks.tables")


def _layers_of(model: Transformer) -> Layers:
    """Some layers. x: [rows, dim] fp32. cos_sin: the model's. positions, kv_index: [rows] int64. cached: keys and
    values of each layer, as rows of the cache; written in place. Returns x and what Inductor is to store."""
    config, block = model.config, model.blocks[0]  # all layers have one shape
    eps, head_dim = config.norm_eps, config.head_dim
    q_dim, kv_dim, scale = config.q_dim, config.kv_dim, config.head_dim**-0.5
    qkv_of, o_of, gate_up_of, down_of = (
        _multiplier(model, matrix) for matrix in (block.qkv_proj, block.o_proj, block.gate_up_proj, block.down_proj)
    )

    def layers(
        x: Tensor,
        weights: list[list[Tensor]],
        cos_sin: Tensor,
        positions: Tensor,
        kv_index: Tensor,
        cached: list[tuple[Tensor, Tensor]],
        blocks: QueryBlocks,
    ) -> tuple[Tensor, ...]:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
        stored: list[Tensor] = []
        for (attn_norm, mlp_norm, qkv_proj, o_proj, gate_up_proj, down_proj), (keys, values) in zip(
            weights, cached, strict=True
        ):
            qkv = qkv_of(norm(x, attn_norm, eps), qkv_proj)
            q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split([q_dim, kv_dim, kv_dim], -1))
            keys.index_put_((kv_index,), rotate(k, cos, sin))
            values.index_put_((kv_index,), v)
            attended, parts = attend_blocks(rotate(q, cos * scale, sin * scale), keys, values, blocks)
            stored += parts
            x = x + o_of(attended.flatten(1), o_proj)
            gate, up = gate_up_of(norm(x, mlp_norm, eps), gate_up_proj).chunk(2, -1)
            x = x + down_of(gate / (1 + torch.exp(-gate)) * up, down_proj)
        return x, *stored

    return layers


def _head_of(model: Transformer) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    eps, logits_of = model.config.norm_eps, _multiplier(model, model.lm_head)

    def head(x: Tensor, rows: Tensor, weight: Tensor, lm_head: Tensor) -> Tensor:
        return logits_of(norm(x[rows], weight, eps), lm_head)

    return head


def _multiplier(model: Transformer, matrix: LinearWeight) -> Callable[[Tensor, Tensor], Tensor]:
    """(x fp32, `data` of a weight like this one) -> their product in fp32, multiplied in the model's dtype."""
    dtype, multiply = model.embedding.dtype, packed_linear if matrix.blocked else F.linear
    return lambda x, weight: multiply(x.to(dtype), weight).float()
