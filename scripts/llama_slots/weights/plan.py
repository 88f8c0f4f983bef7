"""What fits on a card and how fast it could be: arithmetic on shapes and datasheets; no GPU and no weights needed."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from llama.cache import default_block_size
from llama.config import EngineConfig, ModelConfig
from llama.errors import ConfigError
from llama_slots.roofline import Card, Format, decode_rate, kv_bytes, prefill_seconds, resident

# H200: measured with a copy and a large matmul; fp8 twice bf16, as the datasheet has it. The others: datasheets, dense.
CARDS = {
    "H200": Card(139 * 2**30, 4.3e12, 790e12, 1580e12, "sold as 141 GB; measured, fp8 as twice bf16"),
    "B200": Card(180e9, 7.7e12, 2250e12, 4500e12, "datasheet"),
    "H100": Card(80e9, 3.35e12, 989e12, 1979e12, "datasheet, SXM"),
    "A100-80GB": Card(80e9, 2.039e12, 312e12, None, "datasheet, SXM"),
    "A100-40GB": Card(40e9, 1.555e12, 312e12, None, "datasheet, SXM"),
    "L40S": Card(48e9, 0.864e12, 362e12, 733e12, "datasheet"),
    "L4": Card(24e9, 0.3e12, 121e12, 242e12, "datasheet"),
    "RTX-4090": Card(24e9, 1.008e12, 165e12, 330e12, "datasheet"),
    "RTX-3090": Card(24e9, 0.936e12, 71e12, None, "datasheet"),
}

# int4: groups of 128 with an fp16 scale. int8 and int4 are turned into bf16 on the way to the tensor cores.
FORMATS = {
    "bf16": Format(16, 2, "bf16"),
    "fp8": Format(8, 1, "fp8"),
    "int8": Format(8, 1, "bf16"),
    "int4": Format(4.125, 1, "bf16"),
}
# What the figures take for granted; printed with every plan.
ASSUMPTIONS = (
    "Speeds are the roofline's limits, which no engine passes: each step reads every weight and every cached key and "
    "value once at the card's bandwidth; real engines reach a part of it.",
    "The whole context is filled in every slot. A prompt's attention runs at three quarters of the bf16 rate.",
    "fp8, int8, int4: the layers' matrices only; embedding and output matrix stay bf16, the KV cache is fp8. int4 has "
    "an fp16 scale for each 128 weights; int8 and int4 are multiplied as bf16.",
    "Memory: 1 GB of the card is CUDA's own, and 92 % of what weights and activations leave becomes KV cache, as in "
    "the engine's own plan.",
    "This is about the card and not about this engine: which of these formats the engine runs, its README says.",
)
# CUDA's own memory, before the engine takes its share of what is left; both as in llama/cache.py on a fresh card.
_CONTEXT = 1e9
_SHARE = 0.92


@dataclass(frozen=True)
class Plan:
    """One format on one card. Bytes, tokens, tokens per second, seconds. slots_that_fit: of the whole context each."""

    format: str
    weights: float
    activations: float
    kv_per_token: int
    kv_cache: float
    kv_tokens: int
    slots_that_fit: int
    slots_used: int
    tokens_per_second_alone: float | None
    tokens_per_second_all: float | None
    prefill_seconds: float | None


def plan_all(model: ModelConfig, card_name: str, slots: int, context: int | None, formats: list[str]) -> dict[str, Any]:
    """A plan per format, with the card and the question. Raises ConfigError for what makes no sense."""
    if card_name not in CARDS:
        raise ConfigError("card", card_name, f"must be one of {', '.join(CARDS)}")
    if slots < 1:
        raise ConfigError("slots", slots, "must be at least 1")
    context = model.max_seq_len if context is None else context
    if not 1 <= context <= model.max_seq_len:
        raise ConfigError("context", context, f"must be 1 to {model.max_seq_len}, the model's own")
    card = CARDS[card_name]
    plans = [asdict(plan_one(model, card, name, slots, context)) for name in formats]
    return {
        "card": card_name,
        **asdict(card),
        "slots": slots,
        "context": context,
        "plans": plans,
        "assumptions": ASSUMPTIONS,
    }


def plan_one(model: ModelConfig, card: Card, name: str, slots: int, context: int) -> Plan:
    kept = FORMATS[name]
    weights = resident(model, kept)
    acts = activations(model, EngineConfig())
    kv = kv_bytes(model, kept)
    block = default_block_size("cuda")
    left = (card.memory - _CONTEXT - weights - acts) * _SHARE
    blocks = max(0, int(left) // (kv * block) - 1)  # one block is padding
    fit = blocks // math.ceil(context / block)
    used = min(slots, fit)
    alone = everyone = prefill = None
    if used and (card.fp8 or kept.multiplies_in != "fp8"):
        alone = decode_rate(model, card, kept, 1, context)
        everyone = decode_rate(model, card, kept, used, context)
        prefill = prefill_seconds(model, card, kept, context)
    return Plan(name, weights, acts, kv, blocks * block * kv, blocks * block, fit, used, alone, everyone, prefill)


def activations(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes of a step's intermediate results in bf16; the engine's own plan (llama/cache.py) says the same."""
    widest = 4 * model.dim + model.q_dim + 2 * model.kv_dim + 3 * model.ffn_dim
    logit_rows = min(engine.max_batch_seqs, engine.max_batch_tokens)
    return engine.max_batch_tokens * widest * 2 + 4 * logit_rows * model.vocab_size * 4


def table(plans: dict[str, Any], title: str) -> str:
    """What `plan_all` gives, as text."""
    lines = [
        f"{title} on one {plans['card']}: {plans['memory'] / 2**30:.0f} GiB = {plans['memory'] / 1e9:.0f} GB, "
        f"{plans['bandwidth'] / 1e12:.2f} TB/s, "
        f"{plans['bf16'] / 1e12:.0f} TFLOP/s bf16 ({plans['source']})",
        f"{plans['slots']} slots of {plans['context']} tokens wanted",
        "",
        f"{'':6}{'weights':>10}{'KV/token':>10}{'activ.':>9}{'KV cache':>10}{'tokens':>10}{'slots':>7}"
        f"{'tok/s alone':>13}{'tok/s all':>11}{'prompt':>9}",
    ]
    for plan in plans["plans"]:
        speeds = f"{'does not fit':>33}"
        if plan["tokens_per_second_alone"] is not None:
            speeds = (
                f"{plan['tokens_per_second_alone']:>13.1f}{plan['tokens_per_second_all']:>11.0f}"
                f"{plan['prefill_seconds'] * 1e3:>6.0f} ms"
            )
        elif plan["slots_used"]:
            speeds = f"{'this card does not multiply it':>33}"
        lines.append(
            f"{plan['format']:6}{plan['weights'] / 1e9:>7.2f} GB{plan['kv_per_token'] / 1024:>6.0f} KiB"
            f"{plan['activations'] / 1e9:>6.2f} GB{plan['kv_cache'] / 1e9:>7.1f} GB{plan['kv_tokens']:>10,}"
            f"{plan['slots_that_fit']:>7}{speeds}"
        )
    lines += [
        "",
        "slots: how many requests of the whole context fit at once. tok/s: for one request, and for as many of the "
        f"{plans['slots']} wanted",
        "as fit. prompt: time to read one of the whole context. What is assumed:",
        *(textwrap.fill(text, 116, initial_indent="- ", subsequent_indent="  ") for text in plans["assumptions"]),
    ]
    if all(plan["slots_used"] == 0 for plan in plans["plans"]):
        least = min(plan["weights"] + plan["activations"] for plan in plans["plans"]) / 1e9
        lines.append(
            f"Nothing fits: without any KV cache it takes {least:.1f} GB; try another --card, model or --context"
        )
    return "\n".join(lines)
