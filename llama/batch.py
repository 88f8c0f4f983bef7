"""`Batch`: a plan as tensors, the way the model wants it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.scheduler import Plan
from llama.sequence import Sequence


@dataclass(frozen=True)
class LastStep:
    """What the step before yields, still on the device. ids: [len(seqs)] int64, -1 where the logits are not finite."""

    ids: Tensor
    seqs: list[Sequence]

    @cached_property
    def row_of(self) -> dict[Sequence, int]:
        return {seq: row for row, seq in enumerate(self.seqs)}

    def fill(self, token_ids: Tensor, rows: Tensor, sources: Tensor) -> None:
        """token_ids[rows] = ids[sources], all int64 on the device. What follows a -1 is of no use to anybody, but must
        not index anything with it."""
        token_ids[rows] = self.ids[sources].clamp(min=0)


@dataclass(frozen=True, slots=True)
class Layout:
    """A plan's sequences one behind the other, in its order, on the host.

    rows: [3, n_rows] int64: token id, position and flat row of the cache. cu_seqlens_q: [n_seqs + 1] int32.
    seqlens_k: [n_seqs] int32. block_tables: [n_seqs, width] int32, 0 past an end.
    unread: [n, 2] int64: a row whose token the host does not know yet, and its row of the last step.
    """

    rows: np.ndarray
    cu_seqlens_q: np.ndarray
    seqlens_k: np.ndarray
    block_tables: np.ndarray
    unread: np.ndarray

    @classmethod
    def of(cls, plan: Plan, block_size: int, last: LastStep | None) -> Layout:
        """last: where to find tokens not read yet."""
        n_seqs = len(plan.seqs)
        rows = np.empty((3, plan.n_tokens), np.int64)
        starts = np.zeros(n_seqs + 1, np.int32)
        lengths = np.empty(n_seqs, np.int32)
        tables = np.zeros((n_seqs, max(len(seq.block_table) for seq in plan.seqs)), np.int32)
        unread: list[tuple[int, int]] = []
        row = 0
        for i, (seq, first, n) in enumerate(zip(plan.seqs, plan.firsts, plan.counts, strict=True)):
            ids, table = seq.token_ids, seq.block_table
            tables[i, : len(table)] = table
            if n == 1:
                if first < len(ids) or last is None:
                    token = ids[first]
                else:
                    token = 0
                    unread.append((row, last.row_of[seq]))
                rows[:, row] = token, first, table[first // block_size] * block_size + first % block_size
            else:
                at = np.arange(first, first + n)
                rows[0, row : row + n] = ids[first : first + n]
                rows[1, row : row + n] = at
                rows[2, row : row + n] = tables[i, at // block_size].astype(np.int64) * block_size + at % block_size
            row += n
            starts[i + 1] = row
            lengths[i] = first + n
        return cls(rows, starts, lengths, tables, np.array(unread, np.int64).reshape(-1, 2))


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
    def from_plan(
        cls, plan: Plan, logit_rows: list[int], block_size: int, device: torch.device, last: LastStep | None = None
    ) -> Batch:
        """On the device, as `Layout` has it. last: where to find tokens not read yet."""
        made = Layout.of(plan, block_size, last)
        known, wanted, pairs = kernels.upload(device, made.rows, np.array(logit_rows, np.int64), made.unread)
        token_ids, positions, kv_index = known.unbind(0)
        if last is not None and len(pairs):
            last.fill(token_ids, *pairs.unbind(1))
        attention = kernels.plan_attention(made.cu_seqlens_q, made.seqlens_k, made.block_tables, block_size, device)
        return cls(token_ids, positions, kv_index, attention, wanted)
