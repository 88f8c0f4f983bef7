"""The whole engine on the interpreted kernels: the stored tokens of trained models, prefill, decode and both mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llama import Engine, EngineConfig, SamplingParams

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of numpy, masked lanes


@pytest.mark.parametrize("name, n_tokens", [("babyllama361", 8), ("stories260K", 8)])
def test_greedy_tokens_are_the_stored_ones(name: str, n_tokens: int, shared_file: Callable[[str], Path]) -> None:
    entries = json.loads(shared_file(f"vectors/{name}_greedy.json").read_text())["greedy"][:3]
    # Steps of at most 24 tokens cut the prompts, so single tokens and pieces share steps.
    config = EngineConfig(
        device="cpu", kv_memory=8 << 20, block_size=16, max_batch_tokens=24, batch_invariant=True, async_scheduling=True
    )
    greedy = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True, logprobs=2)
    with Engine(shared_file(f"models/{name}-hf"), config, progress=False) as engine:
        answers = engine.generate([entry["prompt_ids"] for entry in entries], greedy)
    for answer, entry in zip(answers, entries, strict=True):
        assert answer.token_ids == entry["greedy_ids"][:n_tokens]
        logprobs = [token.logprob for token in answer.logprobs]
        assert logprobs == pytest.approx(entry["logprobs_first20"][:n_tokens], abs=1e-4)
