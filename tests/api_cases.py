"""What the tests of `api` stand on: a tiny checkpoint that needs no data, and an engine that says what it is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import api
from llama.runner import StepResult
from llama.scheduler import Plan
from llama.sequence import TokenLogprobs

MESSAGES = [{"role": "user", "content": "How far is it to the hill?"}]
PROMPT = "Once upon a time there was"


def write_model(folder: Path, tokenizer_file: Path, vocab_size: int = 400, context: int = 256, dim: int = 32) -> Path:
    """A Llama of random weights in Hugging Face form. Its logits are spread widely enough to sample from."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "model.embed_tokens.weight": random(vocab_size, dim, scale=1.0),
        "model.norm.weight": torch.ones(dim),
        "lm_head.weight": random(vocab_size, dim),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", dim, dim),
            ("self_attn.k_proj", dim // 2, dim),
            ("self_attn.v_proj", dim // 2, dim),
            ("self_attn.o_proj", dim, dim),
            ("mlp.gate_proj", 2 * dim, dim),
            ("mlp.up_proj", 2 * dim, dim),
            ("mlp.down_proj", dim, 2 * dim),
        ):
            weights[f"{layer}.{name}.weight"] = random(rows, columns)
        weights[f"{layer}.input_layernorm.weight"] = torch.ones(dim)
        weights[f"{layer}.post_attention_layernorm.weight"] = torch.ones(dim)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    return folder


@dataclass
class Computed:
    """In the place of a pending step: one whose result is known."""

    known: StepResult

    def result(self) -> StepResult:
        return self.known


class Script:
    """In the place of an engine's `Runner`: every sequence gets the tokens that `say` gives, one by one.

    say(index, prompt) -> token ids; after the last one comes EOS (2). gate, when set, is called before each step, in
    the engine thread. The logprobs are made up, and distinct.
    """

    def __init__(self, say: Callable[[int, Sequence[int]], Sequence[int]]) -> None:
        self.say = say
        self.gate: Callable[[], object] | None = None
        self.n_steps = 0

    def launch(self, plan: Plan) -> Computed:
        self.n_steps += 1
        if self.gate is not None:
            self.gate()
        result = StepResult([None] * len(plan.seqs), [None] * len(plan.seqs))
        for i, (seq, first, n) in enumerate(zip(plan.seqs, plan.firsts, plan.counts, strict=True)):
            if seq.params.prompt_logprobs is not None:
                for position in range(len(seq.prompt_logprobs) + 1, min(first + n + 1, seq.n_prompt)):
                    entry = made_up(seq.token_ids[position], position, seq.params.prompt_logprobs)
                    seq.prompt_logprobs.append(entry)
            if plan.yields[i]:
                script = self.say(seq.index, seq.token_ids[: seq.n_prompt])
                token = script[seq.n_generated] if seq.n_generated < len(script) else 2
                result.tokens[i] = token
                if seq.params.logprobs is not None:
                    result.logprobs[i] = made_up(token, len(seq.token_ids), seq.params.logprobs)
        return Computed(result)


def made_up(token: int, position: int, n_top: int) -> TokenLogprobs:
    """Logprobs that tell which token and place they belong to; the chosen token is the best but one."""
    value = -(token + position / 1000)
    others = [(i + 3, value + 0.5 - i) for i in range(n_top) if i + 3 != token]
    top = sorted([*others, (token, value)], key=lambda pair: -pair[1])[:n_top]
    return TokenLogprobs(token, value, top)


@contextmanager
def scripted(
    client: api.Client | api.AsyncClient, say: Callable[[int, Sequence[int]], Sequence[int]]
) -> Iterator[Script]:
    """Let the client's engine, idle before and after, say what it is told."""
    loop = client.served.find().engine._loop
    runner, loop.runner = loop.runner, Script(say)
    try:
        yield loop.runner
    finally:
        loop.runner = runner


def error_of(call: Callable[..., Any], *args: Any, **fields: Any) -> api.APIError:
    """The error that a call raises."""
    try:
        call(*args, **fields)
    except api.APIError as error:
        return error
    raise AssertionError(f"no error for {fields}")


def idle(client: api.Client | api.AsyncClient) -> bool:
    """Nothing is held: no slot, no sequence, no block."""
    stats = client.stats()
    return (stats.slots_in_use, stats.running, stats.waiting) == (0, 0, 0) and stats.blocks_free == stats.blocks
