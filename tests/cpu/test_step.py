"""A plan laid out: rows, tables and spans against a layout written down token by token, over the life of sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from llama.batch import BlockTables, LastStep, Step
from llama.request import Request, SamplingParams
from llama.scheduler import Plan
from llama.sequence import Sequence, TokenLogprobs

SIZE = 4


def make_sequence(rng: random.Random) -> Sequence:
    n_prompt = rng.randrange(1, 30)
    params = SamplingParams(prompt_logprobs=rng.choice([None, None, 2]))
    ids = [rng.randrange(100) for _ in range(n_prompt)]
    return Sequence(Request([ids], params), 0, ids, n_prompt, 99, 0, frozenset())


def grow(seq: Sequence, n_tokens: int, rng: random.Random) -> None:
    while len(seq.block_table) * SIZE < n_tokens:
        seq.block_table.append(rng.randrange(1, 1000))


@pytest.mark.parametrize("seed", range(30))
def test_tables_are_those_of_the_sequences_whatever_became_of_them(seed: int) -> None:
    """Sequences come, go, miss steps, grow, and get new lists, of equal length or not."""
    rng = random.Random(seed)
    tables, seqs = BlockTables(), [make_sequence(rng) for _ in range(3)]
    for _ in range(60):
        for seq in seqs:
            if rng.random() < 0.1:
                seq.block_table = []
            grow(seq, rng.randrange(1, 9) + len(seq.block_table) * SIZE * rng.randrange(2), rng)
        if len(seqs) < 12 and rng.random() < 0.5:
            seqs.append(make_sequence(rng))
            grow(seqs[-1], rng.randrange(1, 60), rng)
        if len(seqs) > 1 and rng.random() < 0.3:
            seqs.pop(rng.randrange(len(seqs)))
        step = rng.sample(seqs, rng.randrange(1, len(seqs) + 1))
        expected = np.zeros((len(step), max(len(seq.block_table) for seq in step)), np.int32)
        for row, seq in zip(expected, step, strict=True):
            row[: len(seq.block_table)] = seq.block_table
        laid = tables.of(step)
        assert np.array_equal(laid, expected) and laid.dtype == np.int32 and laid.flags.c_contiguous
        laid[:] = -1  # a copy: the next step must not see it
        assert len(tables._rows) == len(step), "no row is kept for who is gone"
        assert len(tables._blocks) <= 64, "rows are used again"


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_those_of_the_plan(seed: int) -> None:
    rng = random.Random(seed)
    plan, last_seqs = Plan(), []
    for _ in range(rng.randrange(1, 8)):
        seq = make_sequence(rng)
        if rng.random() < 0.5:  # a decode; perhaps of a token that the step before yields
            first, n, yields = len(seq.token_ids) - rng.choice([0, 1]), 1, True
            last_seqs += [seq] if first == len(seq.token_ids) else []
        else:
            first = rng.randrange(seq.n_prompt)
            n = rng.randrange(1, seq.n_prompt - first + 1)
            yields = first + n == seq.n_prompt
            seq.prompt_logprobs = [TokenLogprobs(0, 0.0, [])] * rng.choice([0, first, seq.n_prompt // 2])
        grow(seq, first + n, rng)
        plan.add(seq, first, n, yields)
    rng.shuffle(last_seqs)
    step = Step.of(plan, BlockTables(), SIZE, LastStep(torch.zeros(len(last_seqs)), last_seqs))

    row, unread, sampled_rows, reported = 0, [], [], []
    for i, (seq, first, n) in enumerate(zip(plan.seqs, plan.firsts, plan.counts, strict=True)):
        assert step.cu_seqlens_q[i] == row and step.seqlens_k[i] == first + n
        for position in range(first, first + n):
            if position < len(seq.token_ids):
                assert step.rows[0, row] == seq.token_ids[position]
            else:
                unread.append([row, last_seqs.index(seq)])
            block = seq.block_table[position // SIZE]
            assert step.rows[1:, row].tolist() == [position, block * SIZE + position % SIZE]
            asked = seq.params.prompt_logprobs is not None and position + 1 < seq.n_prompt
            reported += [row] if asked and position >= len(seq.prompt_logprobs) else []
            row += 1
        sampled_rows += [row - 1] if plan.yields[i] else []
    assert step.n_rows == step.cu_seqlens_q[-1] == row
    assert step.unread.tolist() == unread
    assert step.sampled == [i for i, yields in enumerate(plan.yields) if yields]
    assert step.sampled_rows.tolist() == sampled_rows
    assert step.logit_rows.tolist() == sampled_rows + reported
    for span in step.prompt_spans:
        assert step.rows[1, span.row : span.row + span.n].tolist() == list(range(span.first, span.first + span.n))
