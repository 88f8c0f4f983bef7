"""`Transformer`: the Llama-2 decoder (arXiv 2302.13971, 2307.09288). It knows no request and has no state but weights.

Parameters have Meta's dimensions and our names; q/k/v and gate/up are fused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import LinearWeight
from llama.batch import Batch
from llama.cache import KVCache
from llama.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter. With tied embeddings there is no lm_head."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, config.dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attn_norm": (config.dim,),
            f"layers.{i}.qkv_proj": (config.q_dim + 2 * config.kv_dim, config.dim),
            f"layers.{i}.o_proj": (config.dim, config.q_dim),
            f"layers.{i}.mlp_norm": (config.dim,),
            f"layers.{i}.gate_up_proj": (2 * config.ffn_dim, config.dim),
            f"layers.{i}.down_proj": (config.dim, config.ffn_dim),
        }
    shapes["norm"] = (config.dim,)
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, config.dim)
    return shapes


Matrix = TypeVar("Matrix")  # what a layer multiplies with: a LinearWeight, or a tensor in a compiled function


class Block(NamedTuple, Generic[Matrix]):
    """One layer's weights; names and shapes as in `parameter_shapes`."""

    attn_norm: Tensor
    qkv_proj: Matrix
    o_proj: Matrix
    mlp_norm: Tensor
    gate_up_proj: Matrix
    down_proj: Matrix


def layer(
    block: Block[Matrix],
    h: Tensor,
    x: Tensor | None,
    norm: Callable[..., tuple[Tensor, Tensor]],
    multiply: Callable[[Tensor, Matrix], Tensor],
    attend: Callable[[Tensor], Tensor],
    swiglu: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """One layer, written once: each way of computing it gives its own norm, multiply, attend and swiglu.

    x: the residual stream before h is added to it; None: h is all of it. Returns the next h and x, of the same shapes.
    norm: as `kernels.rms_norm`, with its eps. attend: qkv to the results of all heads, side by side.
    """
    h, x = norm(h, block.attn_norm, residual=x)
    h = multiply(attend(multiply(h, block.qkv_proj)), block.o_proj)
    h, x = norm(h, block.mlp_norm, residual=x)
    return multiply(swiglu(multiply(h, block.gate_up_proj)), block.down_proj), x


class Transformer:
    """Takes the tensors of `parameter_shapes` out of `parameters`, which is empty afterwards.

    keep_rows: of `kernels.pack_weight`.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, Tensor],
        max_seq_len: int,
        batch_invariant: bool,
        keep_rows: bool = False,
    ) -> None:
        self.config, self.batch_invariant = config, batch_invariant

        def take(name: str) -> Any:
            tensor = parameters.pop(name)
            return tensor if name.endswith("norm") else kernels.pack_weight(tensor, keep_rows)

        self.embedding = parameters.pop("embedding")
        self.lm_head = kernels.pack_weight(self.embedding, keep_rows) if config.tie_embeddings else take("lm_head")
        self.norm = parameters.pop("norm")
        self.blocks: list[Block[LinearWeight]] = [
            Block(*(take(f"layers.{i}.{name}") for name in Block._fields)) for i in range(config.n_layers)
        ]
        self.cos_sin = kernels.rope_table(
            config.head_dim, max_seq_len, config.rope_theta, config.rope_scale, self.embedding.device
        )

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute the batch's tokens, write their K/V, and return [len(batch.logit_rows), dim] for `logits`."""
        norm = partial(kernels.rms_norm, eps=self.config.norm_eps, batch_invariant=self.batch_invariant)
        multiply = partial(kernels.linear, batch_invariant=self.batch_invariant)
        swiglu = partial(kernels.swiglu, batch_invariant=self.batch_invariant)
        h, x = F.embedding(batch.token_ids, self.embedding), None
        for block, k_cache, v_cache in zip(self.blocks, cache.k, cache.v, strict=True):
            attend = partial(self._attend, batch, k_cache, v_cache)
            h, x = layer(block, h, x, norm, multiply, attend, swiglu)
        assert x is not None
        rows = batch.logit_rows
        return norm(h[rows], self.norm, residual=x[rows])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: rows that `forward` returned. Returns [rows, vocab_size] fp32."""
        return kernels.linear(hidden, self.lm_head, batch_invariant=self.batch_invariant).float()

    def _attend(self, batch: Batch, k_cache: Tensor, v_cache: Tensor, qkv: Tensor) -> Tensor:
        n_heads, head_dim = self.config.n_heads, self.config.head_dim
        q = kernels.rope_write(qkv, self.cos_sin, batch.positions, batch.kv_index, k_cache, v_cache, n_heads)
        scale, invariant = head_dim**-0.5, self.batch_invariant
        out = kernels.paged_attention(q, k_cache, v_cache, batch.attention, scale, batch_invariant=invariant)
        return out.flatten(1).to(qkv.dtype)


def random_parameters(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of an exact shape for benchmarks: normal with deviation 0.02 (norms 1), the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        is_norm = name.endswith("norm")
        parameters[name] = tensor.fill_(1) if is_norm else tensor.normal_(0, 0.02, generator=generator)
    return parameters
