"""`OneRow`: decode steps of one sequence on the CPU, with a few layers at a time compiled into one function.

Such a step takes as long as reading its weights. Inductor's loops read at memory's speed, oneDNN's multiply does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from llama.batch import LastStep, Step
from llama.cache import KVCache
from llama.cpu.compile import compile_isolated, group_layers, rms_norm, rotate, swiglu
from llama.model import Block, Transformer, layer

# Inductor compiles sizes 0 and 1 as constants; with this many cached tokens all lengths share one function.
_MIN_CACHED = 2


class OneRow:
    """model: with the rows of its weights (`keep_rows`). Constructing it compiles.

    Make it and the cache under torch.inference_mode, as steps run. For tensors of another kind, torch.compile would
    compile once more, in the first request.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._layers = compile_isolated(_layers_of(model), _is_length, any_threads=False)
        self._head = compile_isolated(_head_of(model), _is_length, any_threads=False)
        self._groups = group_layers(model.blocks, lambda matrix: matrix.one_row)
        self._lm_head = model.lm_head.one_row
        self._rows = cache.whole.flatten(0, 1).flatten(1, 2)  # [2 * n_layers, tokens, n_kv_heads, head_dim], k then v
        shape = 2 * len(self._groups[0]), _MIN_CACHED + 1, *self._rows.shape[2:]
        cached = list(self._rows.new_zeros(shape).unbind(0))
        for keys_or_values in cached:
            torch._dynamo.mark_dynamic(keys_or_values, 0)
        x = model.embedding[0].to(torch.float32, copy=True)
        x = self._layers(x, self._groups[0], model.cos_sin[0], cached)[0]
        self._head(x, model.norm, self._lm_head)

    def serves(self, step: Step) -> bool:
        """Whether the step is a decode of one sequence whose token the host knows."""
        if step.n_rows != 1 or not step.sampled or len(step.unread) or step.prompt_spans:
            return False
        return step.plan.firsts[0] >= _MIN_CACHED

    def run(self, step: Step, last: LastStep | None) -> Tensor:
        """Logits [1, vocab_size] fp32."""
        token_id, position, row = step.rows[:, 0].tolist()
        cached = iter(self._cached(step.plan.seqs[0].block_table, position))
        cos_sin = self.model.cos_sin[position]
        x = self.model.embedding[token_id].to(torch.float32, copy=True)  # a view would be compiled for anew
        new: list[Tensor] = []
        for weights in self._groups:
            x, keys_and_values, *_ = self._layers(x, weights, cos_sin, list(islice(cached, 2 * len(weights))))
            new.append(keys_and_values)
        self._rows[:, row] = torch.cat(new)
        return self._head(x, self.model.norm, self._lm_head)[0]

    def _cached(self, table: list[int], n_tokens: int) -> Iterable[Tensor]:
        """Keys, then values, of each layer, of a sequence's first tokens: in place where its blocks lie side by side,
        else copied, those of one call at a time."""
        size = self.cache.block_size
        first, n_blocks = table[0], -(-n_tokens // size)
        if table[:n_blocks] == list(range(first, first + n_blocks)):
            return self._rows[:, first * size : first * size + n_tokens].unbind(0)
        scattered = (torch.tensor(table[:n_blocks])[:, None] * size + torch.arange(size)).flatten()[:n_tokens]
        return (rows.index_select(0, scattered) for rows in self._rows)


def _is_length(name: str, guard_type: str) -> bool:
    """Of what guards check only the number of cached tokens ever changes, for all tensors of a call alike."""
    return "cached" in name and name.endswith("[0]")


def _layers_of(model: Transformer) -> Callable[..., tuple[Tensor, ...]]:
    """Some layers on one row. x: [dim] fp32. cos_sin: [head_dim]. cached: keys, then values, of each layer, [n,
    n_kv_heads, head_dim] fp32, of the tokens before.

    Returns x, keys and values of the new token, [2 * layers, n_kv_heads, head_dim], and what several loops read: what a
    function does not return, Inductor would compute anew for every row of a weight.
    """
    config = model.config
    head_dim, n_kv_heads = config.head_dim, config.n_kv_heads
    group, sizes, scale = config.n_heads // n_kv_heads, [config.q_dim, config.kv_dim, config.kv_dim], head_dim**-0.5
    norm = partial(rms_norm, eps=config.norm_eps)

    def layers(x: Tensor, weights: list[Block[Tensor]], cos_sin: Tensor, cached: list[Tensor]) -> tuple[Tensor, ...]:
        cos, sin = cos_sin.chunk(2)
        new: list[Tensor] = []
        stored: list[Tensor] = []

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            stored.append(x)
            return _multiply(x, weight)

        def attend(keys: Tensor, values: Tensor, qkv: Tensor) -> Tensor:
            q, k, v = (part.view(-1, head_dim) for part in qkv.split(sizes))
            q, k = rotate(q, cos, sin) * scale, rotate(k, cos, sin)
            q = q.view(n_kv_heads, group, head_dim)
            scores = (keys.unsqueeze(2) * q).sum(-1)  # [n, n_kv_heads, group]
            own_score = (k.unsqueeze(1) * q).sum(-1)
            m_i = torch.maximum(scores.amax(0), own_score)
            part, own_part = torch.exp(scores - m_i), torch.exp(own_score - m_i)
            l_i = part.sum(0) + own_part
            acc = (part.unsqueeze(-1) * values.unsqueeze(2)).sum(0) + own_part.unsqueeze(-1) * v.unsqueeze(1)
            new.extend((k, v))
            stored.extend((q, part))
            return (acc / l_i.unsqueeze(-1)).view(-1)

        for i, block in enumerate(weights):
            attend_layer = partial(attend, cached[2 * i], cached[2 * i + 1])
            h, residual = layer(block, x, None, norm, multiply, attend_layer, swiglu)
            x = residual + h
            stored.append(x)
        return x, torch.stack(new), *stored[:-1]

    return layers


def _head_of(model: Transformer) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    eps = model.config.norm_eps

    def head(x: Tensor, weight: Tensor, lm_head: Tensor) -> tuple[Tensor, ...]:
        h, _ = rms_norm(x, weight, eps)
        return _multiply(h, lm_head).unsqueeze(0), h

    return head


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """weight [n, k] @ x [k], written as the loop that Inductor makes of it; a matmul would go to oneDNN.

    An int32 weight is one of `kernels.cpu.packed_linear.pair_columns`: a shift or a mask gives fp32 numbers in fewer
    instructions than widening bf16.
    """
    if weight.dtype != torch.int32:
        return (weight.float() * x).sum(-1)
    half = weight.shape[1]
    left, right = (weight << 16).view(torch.float32), (weight & -65536).view(torch.float32)
    return (left * x[:half] + right * x[half:]).sum(-1)
