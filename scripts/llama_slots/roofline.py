"""How fast a model could be on a machine: arithmetic on shapes and two rates; no engine passes these limits.

A decode step of B sequences with c tokens each reads every weight and every cached key and value once, and multiplies
every weight by B rows:
    t = max(streamed / bandwidth, linear flops) + B * c * kv_bytes / bandwidth        tok/s = B / t
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.config import ModelConfig


@dataclass(frozen=True)
class Card:
    """memory: bytes. bandwidth: bytes/s. bf16, fp8: dense multiplications and additions/s; fp8 None: has none."""

    memory: float
    bandwidth: float
    bf16: float
    fp8: float | None
    source: str


@dataclass(frozen=True)
class Format:
    """How the matrices are kept. bits: of one weight, scales included. kv_bytes: of one cached number.

    head_bytes: of one number of the embedding and the output matrix, which stay bf16 when the rest is quantized.
    """

    bits: float
    kv_bytes: int
    multiplies_in: str
    head_bytes: int = 2


@dataclass(frozen=True)
class Work:
    """What a step must do at least: multiplications and additions, and bytes from memory."""

    flops: float
    nbytes: float


def plain_format(itemsize: int) -> Format:
    """Every number kept in one dtype of so many bytes, and multiplied at the rate that a Card calls bf16."""
    return Format(8 * itemsize, itemsize, "bf16", itemsize)


def linear_parameters(model: ModelConfig) -> int:
    """Of the layers' matrices."""
    per_layer = model.dim * (2 * model.q_dim + 2 * model.kv_dim) + 3 * model.dim * model.ffn_dim
    return model.n_layers * per_layer


def resident(model: ModelConfig, kept: Format) -> float:
    """Bytes of all weights on the card."""
    linear = linear_parameters(model)
    return linear * kept.bits / 8 + kept.head_bytes * (model.n_params - linear)


def streamed(model: ModelConfig, kept: Format) -> float:
    """Bytes of weights that a step reads: all but the embedding, of which it takes a few rows."""
    return linear_parameters(model) * kept.bits / 8 + kept.head_bytes * model.vocab_size * model.dim


def kv_bytes(model: ModelConfig, kept: Format) -> int:
    """Bytes of K and V per cached token."""
    return 2 * model.n_layers * model.kv_dim * kept.kv_bytes


def decode_work(model: ModelConfig, kept: Format, batch: float, context: float) -> Work:
    """One step of `batch` sequences that each have `context` tokens."""
    head = model.vocab_size * model.dim
    flops = 2 * batch * (linear_parameters(model) + head) + 4 * batch * context * model.q_dim * model.n_layers
    return Work(flops, streamed(model, kept) + batch * context * kv_bytes(model, kept))


def prefill_work(model: ModelConfig, kept: Format, tokens: int) -> Work:
    """One prompt; its logits are wanted at the last position only, and attention is causal."""
    flops = 2 * tokens * linear_parameters(model) + 2 * model.vocab_size * model.dim + _attention(model, tokens)
    return Work(flops, streamed(model, kept) + tokens * kv_bytes(model, kept))


def serving_work(model: ModelConfig, kept: Format, batch: float, isl: int, osl: int) -> Work:
    """osl decode steps of `batch` sequences with isl tokens in, and their prompts; counted as in `serving_rate`."""
    step = decode_work(model, kept, batch, isl + osl / 2)
    prompt = 2 * linear_parameters(model) * isl + _attention(model, isl)
    return Work(osl * step.flops + batch * prompt, osl * step.nbytes)


def decode_rate(model: ModelConfig, card: Card, kept: Format, batch: float, context: float) -> float:
    """Tokens per second of `batch` sequences that each have `context` tokens."""
    reading = streamed(model, kept) / card.bandwidth
    caches = batch * context * kv_bytes(model, kept) / card.bandwidth
    return batch / (max(reading, _multiplying(model, card, kept, batch)) + caches)


def prefill_seconds(model: ModelConfig, card: Card, kept: Format, tokens: int) -> float:
    """Seconds for one prompt: the matrices, then attention at three quarters of the bf16 rate."""
    multiplying = 2 * linear_parameters(model) * tokens / _flops(card, kept)
    matrices = max(multiplying, streamed(model, kept) / card.bandwidth)
    return matrices + _attention(model, tokens) / (0.75 * card.bf16)


def serving_rate(model: ModelConfig, card: Card, kept: Format, batch: float, isl: int, osl: int) -> float:
    """Output tokens per second of `batch` sequences at a time with isl tokens in and osl out.

    Prompts are computed between decode steps, many of them at once, so that reading the weights for them costs nothing.
    """
    step = batch / decode_rate(model, card, kept, batch, isl + osl / 2)
    prompt = 2 * linear_parameters(model) * isl / _flops(card, kept) + _attention(model, isl) / (0.75 * card.bf16)
    return osl / (osl * step / batch + prompt)


def _flops(card: Card, kept: Format) -> float:
    return card.fp8 if kept.multiplies_in == "fp8" and card.fp8 else card.bf16


def _multiplying(model: ModelConfig, card: Card, kept: Format, rows: float) -> float:
    """Seconds of a step's matrix products; the output matrix is never quantized."""
    return 2 * rows * (linear_parameters(model) / _flops(card, kept) + model.vocab_size * model.dim / card.bf16)


def _attention(model: ModelConfig, tokens: int) -> float:
    """Multiplications and additions of causal attention over a prompt: half of 4 n^2."""
    return 2 * tokens**2 * model.q_dim * model.n_layers
