"""Random small Llamas against transformers' LlamaForCausalLM: the same greedy tokens, fp32 logits within 1e-4.

transformers is the oracle here and nothing else. It looks for a package of Hugging Face's called `kernels` and finds
ours; it goes by the version of the distribution and leaves it alone, which the first test watches.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available

import kernels
from llama import Engine, EngineConfig, ModelConfig, SamplingParams
from llama.config import from_hf

N_CONFIGS = 200
N_TOKENS = 32


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Closing an engine collects garbage; what transformers brought along need not be gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_transformers_does_not_take_our_kernels_for_hugging_faces() -> None:
    assert Path(kernels.__file__).parent == Path(__file__).parents[2] / "kernels"
    assert not is_kernels_available()


def random_config(seed: int) -> LlamaConfig:
    """Widths, head sizes and vocabularies that are no multiple of a tile; every number of groups."""
    rng = random.Random(seed)
    n_kv_heads = rng.choice([1, 2, 3])
    groups = [1, 2, 4, 8][seed % 4]
    head_dim = rng.choice([8, 10, 16, 22, 32, 48, 64, 80, 128])
    rope = {"rope_type": "default", "rope_theta": rng.choice([100.0, 1e4, 5e5, 1e6])}
    if seed % 5 == 0:
        rope |= {"rope_type": "linear", "factor": rng.choice([2.0, 4.0, 1.5])}
    return LlamaConfig(
        vocab_size=rng.randrange(40, 700),
        hidden_size=n_kv_heads
        * groups
        * rng.randrange(1 + 16 // (n_kv_heads * groups), 1 + 160 // (n_kv_heads * groups)),
        intermediate_size=rng.randrange(5, 300),
        num_hidden_layers=rng.choice([1, 2, 3]),
        num_attention_heads=n_kv_heads * groups,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=128,
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_parameters=rope,
        tie_word_embeddings=bool(seed // 4 % 2),
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )


def theirs(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they start as ones, which would hide a norm that is forgotten
                parameter.uniform_(0.5, 1.5)
    return model


@torch.inference_mode()
def their_logits(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab]: one forward pass over the whole sequence, no cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def our_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """The logits of every position but the last, as the engine makes them to score a prompt."""
    model = engine._loop.runner.model  # type: ignore[attr-defined]
    logits_of, seen = model.logits, []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(logits_of(hidden).clone())
        return seen[-1]

    model.logits = logits
    engine.generate([tokens], SamplingParams(max_tokens=0, prompt_logprobs=0))
    model.logits = logits_of
    return torch.cat(seen)


@pytest.mark.parametrize("start", range(0, N_CONFIGS, 20))
def test_random_configurations(tmp_path: Path, start: int) -> None:
    """transformers writes the checkpoint and our loader reads it; budgets and block sizes are drawn as well."""
    for seed in range(start, start + 20):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        reference = theirs(random_config(seed), seed)
        reference.save_pretrained(folder)
        config = ModelConfig.from_dir(folder)
        prompt = [1, *(rng.randrange(3, config.vocab_size) for _ in range(rng.randrange(1, 50)))]
        options = EngineConfig(
            device="cpu", kv_memory=64 << 20, batch_invariant=bool(seed % 2),
            max_batch_tokens=rng.choice([1, 7, 64]), block_size=rng.choice([4, 16, 64]),
        )  # fmt: skip
        with Engine(folder, options, progress=False) as engine:
            params = SamplingParams(max_tokens=N_TOKENS, temperature=0, ignore_eos=True)
            tokens = engine.generate([prompt], params)[0].token_ids
            logits = our_logits(engine, prompt + tokens)
        expected = their_logits(reference, prompt + tokens)[:-1]
        assert logits.shape == expected.shape
        worst = (logits - expected).abs().max().item()
        assert worst < 1e-4, f"seed {seed}: {worst:.1e}"
        # Each token is the best one after those before it: so the whole is what transformers would have chosen.
        assert len(tokens) == N_TOKENS
        assert tokens == expected[len(prompt) - 1 :].argmax(-1).tolist(), f"seed {seed}"


def test_the_configurations_cover_what_they_should() -> None:
    configs = [from_hf(random_config(seed).to_dict() | {"architectures": None}) for seed in range(N_CONFIGS)]
    assert {c.n_heads // c.n_kv_heads for c in configs} == {1, 2, 4, 8}
    assert {8, 128} <= {c.head_dim for c in configs}
    assert {c.tie_embeddings for c in configs} == {True, False}
    assert len({c.rope_theta for c in configs}) == 4
    assert {c.rope_scale for c in configs} == {1.0, 1.5, 2.0, 4.0}
    assert sum(c.dim % 16 > 0 and c.vocab_size % 16 > 0 and c.ffn_dim % 16 > 0 for c in configs) > 80
    assert any(c.q_dim != c.dim for c in configs)
