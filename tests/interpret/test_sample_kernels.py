"""Sampling on the device: the same choices as the twin, where rounding leaves no doubt; always legal ones."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FILTERS, filtered, guarded
from torch import Tensor

from kernels import Filters, reference, triton_ops

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:All-NaN"),  # numpy, about rows that are meant to be NaN
]

INF = float("inf")
CPU = torch.device("cpu")


def sample(logits: Tensor, filters: Filters, u: Tensor) -> Tensor:
    return triton_ops.sample(logits, Filters(*map(guarded, filters)), guarded(u))


@pytest.mark.parametrize("vocab", [361, 512, 5000])
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_tokens_of_the_filtered_distribution(vocab: int, settings: dict[str, float]) -> None:
    rows = 12
    logits = guarded(torch.randn(rows, vocab) * 2)
    u = torch.cat((torch.tensor([0.0, 1 - 2.0**-24]), torch.rand(rows - 2)))
    filters = Filters.alike(rows, CPU, **settings)  # type: ignore[arg-type]
    tokens, twin = sample(logits, filters, u), reference.sample(logits, filters, u)
    for row in range(rows):
        probs = filtered(logits[row], **settings)  # type: ignore[arg-type]
        running = probs.cumsum(-1)
        token = int(tokens[row])
        assert probs[token] > 0
        before = float(running[token - 1]) if token else 0.0
        assert before - 2e-6 <= float(u[row]) <= float(running[token]) + 2e-6
    assert int((tokens != twin).sum()) <= 1  # a number within rounding of a border may fall either way


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = guarded(torch.randn(3, 361))
    logits[0, [300, 17, 200]] = 9.0
    logits[1, 360] = 9.0
    logits[2] = -3.0
    assert sample(logits, Filters.alike(3, CPU, temperature=0), torch.rand(3)).tolist() == [17, 360, 0]


def test_rows_without_a_finite_best_logit_give_minus_one() -> None:
    logits = torch.randn(8, 361)
    logits[0, 5], logits[1, 5], logits[2] = float("nan"), INF, -INF
    logits[3, :360] = -INF  # one token left is enough
    logits[4, 5], logits[5, 5], logits[6] = float("nan"), INF, -INF
    logits[7, 1:] = -INF
    filters = Filters.alike(8, CPU)
    filters.temperature[:4] = 0.0
    tokens = sample(guarded(logits), filters, torch.rand(8))
    assert tokens.tolist() == [-1, -1, -1, 360, -1, -1, -1, 0]
    assert torch.equal(tokens, reference.sample(logits, filters, torch.rand(8)))


def test_ties_at_the_border_of_top_k_and_top_p_all_stay() -> None:
    logits = torch.full((3, 64), -20.0)
    logits[:, 10:14] = 1.0
    logits[:, 40] = 2.0
    top_p = torch.tensor([1.0, 0.5, 0.6])  # of row 2, over the best and two of its four equals
    filters = Filters.alike(3, CPU)._replace(top_k=torch.tensor([2, 0, 3]), top_p=top_p)
    probs = filtered(logits[0], 1.0, top_k=2)
    seen = [set() for _ in range(3)]
    for u in torch.linspace(0, 0.999, 23):
        for row, token in enumerate(sample(logits, filters, u.expand(3).contiguous()).tolist()):
            seen[row].add(token)
    assert seen[0] == set(probs.nonzero()[:, 0].tolist()) == {10, 11, 12, 13, 40}
    assert seen[1] == seen[2] == {10, 11, 12, 13, 40}


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.randn(2, 361) * 100
    assert torch.equal(sample(logits, Filters.alike(2, CPU, temperature=1e-30), torch.rand(2)), logits.argmax(-1))


def test_a_row_is_drawn_alike_alone_and_in_a_batch() -> None:
    logits, u = torch.randn(6, 512), torch.rand(6)
    filters = Filters.alike(6, CPU, 0.8, 50, 0.9)
    tokens = sample(logits, filters, u)
    for row in range(6):
        assert sample(logits[row : row + 1], Filters.alike(1, CPU, 0.8, 50, 0.9), u[row : row + 1])[0] == tokens[row]


def test_uniform_is_philox_to_the_bit() -> None:
    edge = torch.tensor([0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x243F6A8885A308D3])
    seeds, positions = edge.repeat_interleave(8), edge.repeat(8)
    assert torch.equal(triton_ops.uniform(guarded(seeds), guarded(positions)), reference.uniform(seeds, positions))
    more = torch.randint(-(2**62), 2**62, (200,))
    drawn = triton_ops.uniform(more, torch.arange(200))
    assert torch.equal(drawn, reference.uniform(more, torch.arange(200)))
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1


@pytest.mark.parametrize("n_top", [0, 1, 20])
@pytest.mark.parametrize("vocab", [361, 4096])
def test_token_logprobs(vocab: int, n_top: int) -> None:
    logits = guarded(torch.randn(4, vocab) * 3)
    logits[1, [7, 300, 11]] = 20.0
    logits[2, 3:] = -INF  # fewer tokens than n_top
    ids = torch.tensor([0, 300, 2, -1])
    chosen, top_ids, top = triton_ops.token_logprobs(logits, guarded(ids), n_top)
    exact = logits.double().log_softmax(-1)
    assert torch.allclose(chosen.double(), exact.gather(1, ids.clamp(min=0)[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    order = exact.sort(dim=-1, descending=True, stable=True).indices[:, :n_top]
    assert torch.equal(top_ids, order)
    assert torch.allclose(top.double(), exact.gather(1, order), atol=2e-6, rtol=1e-6)


def test_token_logprobs_of_a_nan_row_are_nan_with_legal_ids() -> None:
    _, ids, top = triton_ops.token_logprobs(torch.full((1, 64), float("nan")), torch.tensor([3]), 5)
    assert top.isnan().all() and int(ids.min()) >= 0 and int(ids.max()) < 64


@pytest.mark.usefixtures("poisoned")
def test_apply_penalties() -> None:
    logits = guarded(torch.randn(4, 361))
    twin = logits.clone()
    at = torch.randperm(4 * 361)[:200]
    rows, ids = at // 361, at % 361
    bias, repetition, subtract = torch.randn(200), torch.rand(200) + 0.5, torch.randn(200)
    bias[:5] = -INF
    triton_ops.apply_penalties(logits, *(guarded(t) for t in (rows, ids, bias, repetition, subtract)))
    reference.apply_penalties(twin, rows, ids, bias, repetition, subtract)
    assert torch.equal(logits, twin)
    torch.empty(1, dtype=torch.float32)  # this operation allocates nothing
