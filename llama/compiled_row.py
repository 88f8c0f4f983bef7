"""`CompiledRow`: decode steps of one sequence on the CPU, with a few layers at a time compiled into one function.

With one row, a step is the weights' way through memory, and oneDNN's multiply reads at half of what memory gives. The
loops that Inductor makes read each weight once, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.compiled import compile_apart, norm, rotate, weights_of_calls
from llama.model import Transformer
from llama.scheduler import Plan

# Inductor compiles sizes 0 and 1 as constants; with this many cached tokens all lengths share one function.
_MIN_CACHED = 2

# (x, weights of each layer, cos_sin, keys and values of each) -> x, the new token's, and what is returned to be stored
Layers = Callable[[Tensor, list[list[Tensor]], Tensor, list[Tensor]], tuple[Tensor, ...]]


class CompiledRow:
    """model: with the rows of its weights (`keep_rows`). Constructing it compiles, for some seconds to a minute.

    All of it under torch.inference_mode, the making of the cache as well: for tensors of another kind, or views of
    them, torch.compile would compile once more, and the first request would wait for that.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._layers: Layers = compile_apart(_layers_of(model), _is_length, any_threads=False)
        self._head = compile_apart(_head_of(model), _is_length, any_threads=False)
        self._weights = weights_of_calls(model.blocks, lambda matrix: matrix.one_row)
        self._lm_head = model.lm_head.one_row
        self._rows = cache.whole.flatten(0, 1).flatten(1, 2)  # [2 * n_layers, tokens, n_kv_heads, head_dim], k then v
        cached = list(
            self._rows.new_zeros((2 * len(self._weights[0]), _MIN_CACHED + 1, *self._rows.shape[2:])).unbind(0)
        )
        for keys_or_values in cached:
            torch._dynamo.mark_dynamic(keys_or_values, 0)
        x = model.embedding[0].to(torch.float32, copy=True)
        x = self._layers(x, self._weights[0], model.cos_sin[0], cached)[0]
        self._head(x, model.norm, self._lm_head)

    def serves(self, plan: Plan) -> bool:
        """Whether the plan is a decode of one sequence whose token the host knows."""
        if len(plan.seqs) != 1 or plan.counts[0] != 1 or not plan.yields[0]:
            return False
        return _MIN_CACHED <= plan.firsts[0] < len(plan.seqs[0].token_ids)

    def run(self, plan: Plan) -> Tensor:
        """Logits [1, vocab_size] fp32."""
        seq, size = plan.seqs[0], self.cache.block_size
        at, table = plan.firsts[0], seq.block_table
        row = table[at // size] * size + at % size
        first, n_blocks = table[0], -(-at // size)
        if table[:n_blocks] == list(range(first, first + n_blocks)):
            cached = iter(self._rows[:, first * size : first * size + at].unbind(0))
        else:
            scattered = (torch.tensor(table[:n_blocks])[:, None] * size + torch.arange(size)).flatten()[:at]
            cached = (rows.index_select(0, scattered) for rows in self._rows)  # copies of one call at a time
        cos_sin = self.model.cos_sin[at]
        x = self.model.embedding[seq.token_ids[at]].to(torch.float32, copy=True)  # a view would be compiled for anew
        new: list[Tensor] = []
        for weights in self._weights:
            x, made, *_ = self._layers(x, weights, cos_sin, list(islice(cached, 2 * len(weights))))
            new.append(made)
        self._rows[:, row] = torch.cat(new)
        return self._head(x, self.model.norm, self._lm_head)[0]


def _is_length(name: str, guard_type: str) -> bool:
    """Of what guards check only the number of cached tokens ever changes, for all tensors of a call alike."""
    return "cached" in name and name.endswith("[0]")


def _layers_of(model: Transformer) -> Layers:
    """Some layers on one row. x: [dim] fp32. cos_sin: [head_dim]. cached: keys, then values, of each layer, [n,
    n_kv_heads, head_dim] fp32, of the tokens before. Returns x, the same of the new token, [2 * layers, n_kv_heads,
    head_dim], and what several loops read: Inductor stores what it returns, and would compute the rest anew for every
    row of a weight.
    """
    config = model.config
    eps, head_dim, n_kv_heads = config.norm_eps, config.head_dim, config.n_kv_heads
    q_dim, kv_dim, ffn_dim, group = config.q_dim, config.kv_dim, config.ffn_dim, config.n_heads // config.n_kv_heads
    scale = head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        q = q.view(n_kv_heads, group, head_dim)
        scores = (keys.unsqueeze(2) * q).sum(-1)  # [n, n_kv_heads, group]
        own = (k.unsqueeze(1) * q).sum(-1)
        top = torch.maximum(scores.amax(0), own)
        part, own_part = torch.exp(scores - top), torch.exp(own - top)
        total = part.sum(0) + own_part
        mixed = (part.unsqueeze(-1) * values.unsqueeze(2)).sum(0) + own_part.unsqueeze(-1) * v.unsqueeze(1)
        return (mixed / total.unsqueeze(-1)).view(-1), part

    def layer(
        x: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        attn_norm, mlp_norm, qkv_proj, o_proj, gate_up_proj, down_proj = weights
        h = norm(x, attn_norm, eps)
        q, k, v = _multiply(qkv_proj, h).split([q_dim, kv_dim, kv_dim])
        q, k, v = (part.view(-1, head_dim) for part in (q, k, v))
        q, k = rotate(q, cos, sin) * scale, rotate(k, cos, sin)
        attended, part = attend(q, k, v, keys, values)
        x = x + _multiply(o_proj, attended)
        h2 = norm(x, mlp_norm, eps)
        gate, up = _multiply(gate_up_proj, h2).split([ffn_dim, ffn_dim])
        act = gate / (1 + torch.exp(-gate)) * up
        return x + _multiply(down_proj, act), k, v, h, q, part, attended, h2, act

    def layers(x: Tensor, weights: list[list[Tensor]], cos_sin: Tensor, cached: list[Tensor]) -> tuple[Tensor, ...]:
        cos, sin = cos_sin.chunk(2)
        new: list[Tensor] = []
        stored: list[Tensor] = []
        for i, own in enumerate(weights):
            stored.append(x)
            x, k, v, *more = layer(x, own, cos, sin, cached[2 * i], cached[2 * i + 1])
            new += k, v
            stored += more
        return x, torch.stack(new), *stored[1:]

    return layers


def _head_of(model: Transformer) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    eps = model.config.norm_eps

    def head(x: Tensor, weight: Tensor, lm_head: Tensor) -> tuple[Tensor, ...]:
        h = norm(x, weight, eps)
        return _multiply(lm_head, h).unsqueeze(0), h

    return head


def _multiply(weight: Tensor, x: Tensor) -> Tensor:
    """weight [n, k] @ x [k], written as the loop that Inductor makes of it; as a matmul it would go to oneDNN.

    An int32 weight is one of `kernels.linear_weight.pair_columns`: a shift or a mask makes 16 fp32 numbers of a whole
    vector register, where widening bf16 takes half a register and more instructions. From memory it is twice as fast.
    """
    if weight.dtype != torch.int32:
        return (weight.float() * x).sum(-1)
    half = weight.shape[1]
    left, right = (weight << 16).view(torch.float32), (weight & -65536).view(torch.float32)
    return (left * x[:half] + right * x[half:]).sum(-1)
