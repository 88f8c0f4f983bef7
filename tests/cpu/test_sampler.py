"""Sampling: random numbers, distributions against exact ones in float64, penalties, bans, logprobs, bad rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import FILTERS, filtered
from torch import Tensor

import kernels
from llama.request import Request, SamplingParams
from llama.sampler import Sampler
from llama.sequence import Sequence, TokenLogprobs, choice_seed

CPU = torch.device("cpu")


def sequence(prompt: list[int], generated: list[int] | None = None, stop_ids: set[int] | None = None, **fields: Any):
    params = SamplingParams(**fields)
    tokens = [*prompt, *(generated or [])]
    seed = choice_seed(params.seed or 0, 0)
    return Sequence(Request([prompt], params), 0, tokens, len(prompt), 1000, seed, frozenset(stop_ids or ()))


def sample(
    sampler: Sampler, logits: Tensor, seqs: list[Sequence]
) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    """The token behind those that each sequence has."""
    return sampler.sample(logits, seqs, [len(seq.token_ids) for seq in seqs]).read()


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# --- random numbers ---------------------------------------------------------------------------------------------


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. (SC 2011) write it, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    "counter, key, first",
    [
        ([0] * 4, [0] * 2, 0x6627E8D5),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 0x408F276D),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 0xD16CFE09),
    ],
)
def test_the_oracle_gives_the_published_answers(counter: list[int], key: list[int], first: int) -> None:
    """The known-answer vectors of Random123, the authors' own library."""
    assert philox4x32_10(counter, key)[0] == first


def test_uniform_is_the_first_24_bits_of_philox() -> None:
    assert kernels.uniform(torch.tensor([0]), torch.tensor([0])).item() == (0x6627E8D5 >> 8) * 2.0**-24
    rng = np.random.default_rng(0)
    seeds = [0, -1, 1, 2**63 - 1, -(2**63), *rng.integers(-(2**63), 2**63 - 1, 200).tolist()]
    positions = [0, 2**63 - 1, 2**32, 5, 2**32 - 1, *rng.integers(0, 1 << 40, 200).tolist()]
    out = kernels.uniform(torch.tensor(seeds), torch.tensor(positions))
    for seed, position, value in zip(seeds, positions, out.tolist(), strict=True):
        word = philox4x32_10(
            [position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
        )[0]
        assert value == (word >> 8) * 2.0**-24
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() < 1


def test_neighbouring_seeds_choices_and_positions_share_nothing() -> None:
    seeds = torch.tensor([choice_seed(s, j) for s in range(50) for j in range(8)])
    assert len(set(seeds.tolist())) == 400
    for positions in (torch.zeros(400, dtype=torch.int64), torch.arange(400)):
        u = kernels.uniform(seeds, positions)
        assert len(set(u.tolist())) > 398
        assert abs(u.mean().item() - 0.5) < 0.05


# --- distributions ----------------------------------------------------------------------------------------------


def chi_square_limit(freedom: int) -> float:
    """The 99.9 % point of chi-square (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [50, 301])  # more and fewer than the 256 that the top filters look at first
def test_draws_have_the_exact_distribution(filters: dict[str, float], vocab: int) -> None:
    """20,000 seeded draws; nothing outside the support, and chi-square inside it."""
    n = 20_000
    logits = logits_of(1, vocab, seed=vocab)
    seq = sequence([1, 2, 3], **filters)
    seqs = [replace(seq, seed=choice_seed(i, 0)) for i in range(n)]
    tokens, _ = sample(Sampler(CPU), logits.repeat(n, 1), seqs)
    exact = filtered(logits[0], **filters).numpy()  # type: ignore[arg-type]
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[exact == 0].sum() == 0
    # Rare tokens are counted together, so that each cell expects at least five draws.
    order = np.argsort(-exact)
    expected, seen = (exact * n)[order], counts[order]
    n_common = int((expected >= 5).sum())
    expected = np.append(expected[:n_common], expected[n_common:].sum())
    seen = np.append(seen[:n_common], seen[n_common:].sum())
    cells = expected > 0.5
    if cells.sum() > 1:
        chi_square = ((seen - expected)[cells] ** 2 / expected[cells]).sum()
        assert chi_square < chi_square_limit(int(cells.sum()) - 1)
    else:
        assert set(tokens) == {int(exact.argmax())}


def draw(logits: list[float], u: float, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> int:
    filters = kernels.Filters.alike(1, CPU, temperature, top_k, top_p)
    return int(kernels.sample(torch.tensor([logits]), filters, torch.tensor([u])))


def test_the_ends_of_the_unit_interval_stay_inside_the_support() -> None:
    banned = -math.inf
    assert draw([banned, banned, 0.0, 0.0, banned], u=0.0) == 2
    assert draw([banned, banned, 0.0, 0.0, banned], u=1 - 2**-24) == 3
    assert draw([-50.0, 0.0, -50.0], u=1 - 2**-24, top_k=1) == 1
    assert draw([-50.0, 0.0, -50.0], u=0.0, top_p=0.5) == 1


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert draw([1e4, -1e4, 9e3], u=0.7, temperature=1.1e-4) == 0


def test_equal_logits_take_the_lowest_id_when_greedy_and_all_stay_when_drawn() -> None:
    assert draw([0.0, 3.0, 1.0, 3.0], u=0.9, temperature=0.0) == 1
    assert {draw([0.0, 3.0, 1.0, 3.0], u=u, top_k=1) for u in (0.1, 0.9)} == {1, 3}


# --- alone and together -----------------------------------------------------------------------------------------


def mixed_params(i: int) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    return {
        "seed": i,
        "temperature": [0.0, 0.7, 1.0, 1.5][i % 4],
        "top_k": [-1, 5, 300][i % 3],
        "top_p": [1.0, 0.9, 0.4, 1.0, 1.0][i % 5],
        "min_p": [0.0, 0.05][i % 2],
        "presence_penalty": [0.0, 1.0][i // 2 % 2],
        "frequency_penalty": [0.0, -0.5, 0.3][i // 3 % 3],
        "repetition_penalty": [1.0, 1.3, 0.8][i // 4 % 3],
        "logit_bias": {int(t): float(rng.normal()) for t in rng.integers(0, 400, i % 5)},
        "min_tokens": [0, 20][i // 5 % 2],
        "logprobs": [None, 0, 20][i % 3],
    }


def test_seeded_draws_are_equal_alone_and_in_a_batch_of_32() -> None:
    logits = logits_of(32, 400)
    rng = np.random.default_rng(9)
    seqs = [
        sequence(
            rng.integers(0, 400, 1 + i % 7).tolist(), rng.integers(0, 400, i % 11).tolist(), {7, 8}, **mixed_params(i)
        )
        for i in range(32)
    ]
    together = sample(Sampler(CPU), logits.clone(), seqs)
    reordered = sample(Sampler(CPU), logits.flip(0).clone(), seqs[::-1])
    assert (reordered[0][::-1], reordered[1][::-1]) == together
    for i, seq in enumerate(seqs):
        tokens, logprobs = sample(Sampler(CPU), logits[i : i + 1].clone(), [seq])
        assert (tokens[0], logprobs[0]) == (together[0][i], together[1][i])
    pair = sample(Sampler(CPU), logits[4:6].clone(), seqs[4:6])
    assert pair == (together[0][4:6], together[1][4:6])


def test_a_sampler_follows_when_sequences_come_and_go() -> None:
    """The tensors of a batch are kept while its sequences stay the same; here they change at every step."""
    logits = logits_of(3, 100)
    seqs = [sequence([1], seed=i, temperature=t) for i, t in enumerate((0.0, 1.0, 1.5))]
    sampler = Sampler(CPU)
    for choice in ([0, 1, 2], [2, 1, 0], [1], [1], [2], [0, 2]):
        tokens, _ = sample(sampler, logits[choice].clone(), [seqs[i] for i in choice])
        fresh, _ = sample(Sampler(CPU), logits[choice].clone(), [seqs[i] for i in choice])
        assert tokens == fresh


def test_a_draw_depends_on_the_position_and_not_on_the_step() -> None:
    logits = logits_of(1, 400, scale=0.1)
    sampler = Sampler(CPU)
    drawn = []
    for n in (0, 1, 2, 1, 0):
        drawn.append(sample(sampler, logits.clone(), [sequence([1], [5] * n, seed=3)])[0][0])
    assert drawn == [*drawn[:3], drawn[1], drawn[0]]
    assert len(set(drawn)) == 3


# --- penalties and bans -----------------------------------------------------------------------------------------


def penalised(logits: Tensor, seq: Sequence) -> np.ndarray:
    """API.md 2.2 and its order: bias, repetition, presence and frequency, bans; one token at a time in float64."""
    x = logits.double().numpy().copy()
    p = seq.params
    generated = seq.token_ids[seq.n_prompt :]
    for token in range(len(x)):
        x[token] += p.logit_bias.get(token, 0.0)
        if token in seq.token_ids:
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        count = generated.count(token)
        x[token] -= p.presence_penalty * (count > 0) + p.frequency_penalty * count
        if token in seq.stop_ids and len(generated) < p.min_tokens:
            x[token] = -math.inf
    return x


@pytest.mark.parametrize("i", range(30))
def test_penalties_follow_the_formula(i: int) -> None:
    rng = np.random.default_rng(100 + i)
    fields = {**mixed_params(i), "logit_bias": {int(t): float(rng.uniform(-100, 100)) for t in range(0, 40, 7)}}
    seq = sequence(rng.integers(0, 60, 10).tolist(), rng.integers(0, 60, 15).tolist(), {3, 14}, **fields)
    logits = logits_of(3, 60, seed=i)
    expected = penalised(logits[1], seq)
    others = logits[[0, 2]].clone()
    plain = sequence([1], temperature=0)
    Sampler(CPU)._penalise(logits, [plain, seq, plain], [len(s.token_ids) for s in (plain, seq, plain)])
    np.testing.assert_allclose(logits[1].numpy(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(logits[[0, 2]], others), "rows of other requests are left alone"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_a_hundred_decides(temperature: float) -> None:
    logits = logits_of(1, 50)
    best = int(logits.argmax())
    for seed in range(50):
        forced = sequence([1], temperature=temperature, seed=seed, logit_bias={17: 100})
        assert sample(Sampler(CPU), logits.clone(), [forced])[0] == [17]
        banned = sequence([1], temperature=temperature, seed=seed, logit_bias={best: -100})
        assert sample(Sampler(CPU), logits.clone(), [banned])[0] != [best]


def test_stop_ids_cannot_be_drawn_before_min_tokens() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2:] = 20.0
    for n_generated, expected in ((0, {0, 1}), (2, {0, 1}), (3, {2, 3}), (4, {2, 3})):
        drawn = set()
        for seed in range(30):
            seq = sequence([1], [0] * n_generated, {2, 3}, seed=seed, min_tokens=3)
            drawn.add(sample(Sampler(CPU), logits.clone(), [seq])[0][0])
        assert drawn == expected


# --- logprobs ---------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_of(2, 300)
    exact = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    seqs = [
        sequence([1], [4, 5], temperature=0.3, seed=1, logit_bias={9: 100}, repetition_penalty=2.0, logprobs=5),
        sequence([1], temperature=0, logprobs=0),
    ]
    tokens, logprobs = sample(Sampler(CPU), logits.clone(), seqs)
    assert tokens[0] == 9
    assert [entry.token_id for entry in logprobs if entry] == tokens
    for row, entry in enumerate(logprobs):
        assert entry is not None
        assert abs(entry.logprob - exact[row, tokens[row]].item()) < 1e-5
    first, second = logprobs
    assert first is not None
    assert second is not None
    assert [token for token, _ in first.top] == exact[0].topk(5).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(exact[0].topk(5).values.tolist(), abs=1e-5)
    assert second.top == []


def test_equal_logprobs_are_listed_by_id() -> None:
    """Also where more are equal than are asked for."""
    logits = torch.zeros(1, 200)
    logits[0, 150] = 1.0
    _, logprobs = sample(Sampler(CPU), logits, [sequence([1], temperature=0, logprobs=6)])
    assert logprobs[0] is not None
    assert [token for token, _ in logprobs[0].top] == [150, 0, 1, 2, 3, 4]


def test_more_logprobs_than_tokens() -> None:
    _, logprobs = sample(Sampler(CPU), logits_of(1, 7), [sequence([1], temperature=0, logprobs=20)])
    assert logprobs[0] is not None
    assert len(logprobs[0].top) == 7


# --- rows that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_a_bad_row_gives_no_token_and_leaves_the_others_alone(bad: float | str) -> None:
    logits = logits_of(6, 400)
    seqs = [sequence([1], seed=i, temperature=[0.0, 1.0][i % 2], top_p=0.9, logprobs=3) for i in range(6)]
    good, good_logprobs = sample(Sampler(CPU), logits.clone(), seqs)
    for row in (0, 3, 5):
        broken = logits.clone()
        if bad == "all -inf":
            broken[row] = -math.inf
        else:
            broken[row, 123] = bad
        tokens, logprobs = sample(Sampler(CPU), broken, seqs)
        assert tokens == [-1 if i == row else good[i] for i in range(6)]
        assert [entry for i, entry in enumerate(logprobs) if i != row] == [
            entry for i, entry in enumerate(good_logprobs) if i != row
        ]
