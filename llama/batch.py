"""`Batch`: a plan as tensors, the way the model wants it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.scheduler import Plan


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    token_ids, positions, kv_index: [rows] int64, a row per token to compute; kv_index is its flat row in the cache.
    attention: which rows and cache blocks belong together. logit_rows: [n] int64, rows whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    kv_index: Tensor
    attention: kernels.AttentionPlan
    logit_rows: Tensor

    @classmethod
    def from_plan(cls, plan: Plan, logit_rows: list[int], block_size: int, device: torch.device) -> Batch:
        """Lay the plan's sequences one behind the other, in its order."""
        n_rows, n_seqs = plan.n_tokens, len(plan.seqs)
        rows = np.empty((3, n_rows), np.int64)
        starts = np.zeros(n_seqs + 1, np.int32)
        lengths = np.empty(n_seqs, np.int32)
        tables = np.zeros((n_seqs, max(len(seq.block_table) for seq in plan.seqs)), np.int32)
        row = 0
        for i, (seq, n) in enumerate(zip(plan.seqs, plan.counts, strict=True)):
            first, table = seq.num_computed, seq.block_table
            tables[i, : len(table)] = table
            if n == 1:
                cache_row = table[first // block_size] * block_size + first % block_size
                rows[:, row] = seq.token_ids[first], first, cache_row
            else:
                at = np.arange(first, first + n)
                rows[0, row : row + n] = seq.token_ids[first : first + n]
                rows[1, row : row + n] = at
                rows[2, row : row + n] = tables[i, at // block_size].astype(np.int64) * block_size + at % block_size
            row += n
            starts[i + 1] = row
            lengths[i] = first + n
        token_ids, positions, kv_index = torch.from_numpy(rows).to(device).unbind(0)
        attention = kernels.plan_attention(starts, lengths, tables, block_size, device)
        wanted = torch.tensor(logit_rows, dtype=torch.int64).to(device)
        return cls(token_ids, positions, kv_index, attention, wanted)
