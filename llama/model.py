"""`Transformer`: the Llama-2 decoder (arXiv 2302.13971, 2307.09288), read from top to bottom.

Everything a step needs arrives as an argument: `forward(batch, cache)`. The model knows no request and keeps no state
but its weights. Parameters have Meta's dimensions and our names; q/k/v and gate/up are fused.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's weights; shapes as in `parameter_shapes`."""

    attn_norm: Tensor
    qkv_proj: LinearWeight
    o_proj: LinearWeight
    mlp_norm: Tensor
    gate_up_proj: LinearWeight
    down_proj: LinearWeight


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

        def take(name: str) -> LinearWeight:
            return kernels.pack_weight(parameters.pop(name), keep_rows)

        self.embedding = parameters.pop("embedding")
        self.lm_head = kernels.pack_weight(self.embedding, keep_rows) if config.tie_embeddings else take("lm_head")
        self.norm = parameters.pop("norm")
        self.blocks = [
            Block(
                attn_norm=parameters.pop(f"layers.{i}.attn_norm"),
                qkv_proj=take(f"layers.{i}.qkv_proj"),
                o_proj=take(f"layers.{i}.o_proj"),
                mlp_norm=parameters.pop(f"layers.{i}.mlp_norm"),
                gate_up_proj=take(f"layers.{i}.gate_up_proj"),
                down_proj=take(f"layers.{i}.down_proj"),
            )
            for i in range(config.n_layers)
        ]
        self.cos_sin = kernels.rope_table(
            config.head_dim, max_seq_len, config.rope_theta, config.rope_scale, self.embedding.device
        )

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Compute the batch's tokens, write their K/V, and return [len(batch.logit_rows), dim] for `logits`."""
        eps, exact = self.config.norm_eps, self.batch_invariant
        x = F.embedding(batch.token_ids, self.embedding)
        h, x = kernels.rms_norm(x, self.blocks[0].attn_norm, eps, batch_invariant=exact)
        for i, block in enumerate(self.blocks):
            h = self._attention(block, h, batch, cache.k[i], cache.v[i])
            h, x = kernels.rms_norm(h, block.mlp_norm, eps, x, batch_invariant=exact)
            h = kernels.linear(h, block.gate_up_proj, batch_invariant=exact)
            h = kernels.swiglu(h, batch_invariant=exact)
            h = kernels.linear(h, block.down_proj, batch_invariant=exact)
            if i + 1 < len(self.blocks):
                h, x = kernels.rms_norm(h, self.blocks[i + 1].attn_norm, eps, x, batch_invariant=exact)
        wanted = batch.logit_rows
        return kernels.rms_norm(h[wanted], self.norm, eps, x[wanted], batch_invariant=exact)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: rows that `forward` returned. Returns [rows, vocab_size] fp32."""
        return kernels.linear(hidden, self.lm_head, batch_invariant=self.batch_invariant).float()

    def _attention(self, block: Block, h: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        config = self.config
        qkv = kernels.linear(h, block.qkv_proj, batch_invariant=self.batch_invariant)
        q = kernels.rope_write(qkv, self.cos_sin, batch.positions, batch.kv_index, k_cache, v_cache, config.n_heads)
        scale = config.head_dim**-0.5
        out = kernels.paged_attention(q, k_cache, v_cache, batch.attention, scale, batch_invariant=self.batch_invariant)
        out = out.reshape(-1, config.q_dim).to(h.dtype)
        return kernels.linear(out, block.o_proj, batch_invariant=self.batch_invariant)


def random_parameters(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of an exact shape for benchmarks: normal with deviation 0.02 (norms 1), the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("norm"):
            made[name] = torch.ones(shape, dtype=dtype, device=device)
        else:
            made[name] = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    return made
