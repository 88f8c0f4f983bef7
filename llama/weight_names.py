"""The one table of names: every tensor of a Llama in Hugging Face's files, in Meta's and among our parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama.config import ModelConfig


@dataclass(frozen=True, slots=True)
class WeightName:
    """A tensor that is rows [start, start + rows) of our `parameter`."""

    parameter: str
    start: int
    rows: int
    meta: str  # its name in Meta's files
    split: int | None  # the dimension that Meta's parts cut; None: each part holds the whole
    head_dim: int = 0  # of q and k, whose rows Meta interleaves


def weight_names(config: ModelConfig) -> dict[str, WeightName]:
    """Hugging Face's name -> the others. lm_head stands here in a model with tied embeddings, too."""
    q, kv, ffn, dim, vocab = config.q_dim, config.kv_dim, config.ffn_dim, config.dim, config.vocab_size
    names = {
        "model.embed_tokens.weight": WeightName("embedding", 0, vocab, "tok_embeddings.weight", 1),
        "model.norm.weight": WeightName("norm", 0, dim, "norm.weight", None),
        "lm_head.weight": WeightName("lm_head", 0, vocab, "output.weight", 0),
    }
    layer = {
        "input_layernorm": WeightName("attn_norm", 0, dim, "attention_norm", None),
        "self_attn.q_proj": WeightName("qkv_proj", 0, q, "attention.wq", 0, config.head_dim),
        "self_attn.k_proj": WeightName("qkv_proj", q, kv, "attention.wk", 0, config.head_dim),
        "self_attn.v_proj": WeightName("qkv_proj", q + kv, kv, "attention.wv", 0),
        "self_attn.o_proj": WeightName("o_proj", 0, dim, "attention.wo", 1),
        "post_attention_layernorm": WeightName("mlp_norm", 0, dim, "ffn_norm", None),
        "mlp.gate_proj": WeightName("gate_up_proj", 0, ffn, "feed_forward.w1", 0),
        "mlp.up_proj": WeightName("gate_up_proj", ffn, ffn, "feed_forward.w3", 0),
        "mlp.down_proj": WeightName("down_proj", 0, dim, "feed_forward.w2", 1),
    }
    for i in range(config.n_layers):
        for hf, name in layer.items():
            parameter, meta = f"layers.{i}.{name.parameter}", f"layers.{i}.{name.meta}.weight"
            names[f"model.layers.{i}.{hf}.weight"] = replace(name, parameter=parameter, meta=meta)
    return names
