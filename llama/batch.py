"""`Step`: a plan laid out once, on the host. `Batch`: the same as tensors, the way the model wants it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.sampler import Report
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
        """token_ids[rows] = ids[sources], all int64 on the device. A -1, which must not index anything, becomes 0."""
        token_ids[rows] = self.ids[sources].clamp(min=0)


class BlockTables:
    """The block tables of the last step's sequences, one row each. A step writes only the blocks that were appended.

    A table is written anew after a step without its sequence, and when preemption has given the sequence another list.
    """

    def __init__(self) -> None:
        self._blocks = np.zeros((1, 1), np.int32)
        self._free = [0]
        # Sequence -> its row, the list that was copied there, and how many of its blocks.
        self._rows: dict[Sequence, tuple[int, list[int], int]] = {}

    def of(self, seqs: list[Sequence]) -> np.ndarray:
        """A copy of these sequences' tables: [len(seqs), longest table] int32, 0 past a table's end."""
        rows, longest = [], 0
        for seq in seqs:
            row, held, n_blocks = self._rows.get(seq) or (0, None, 0)
            if held is not seq.block_table or n_blocks != len(seq.block_table):
                row, n_blocks = self._write(seq)
            rows.append(row)
            longest = max(longest, n_blocks)
        if len(self._rows) > len(seqs):
            for seq in self._rows.keys() - set(seqs):
                self._free.append(self._rows.pop(seq)[0])
        return self._blocks[rows, :longest]

    def _write(self, seq: Sequence) -> tuple[int, int]:
        table = seq.block_table
        row, held, n_blocks = self._rows.get(seq) or (self._free_row(), None, 0)
        if held is not table:
            self._blocks[row], n_blocks = 0, 0
        if len(table) > self._blocks.shape[1]:
            self._blocks = np.pad(self._blocks, ((0, 0), (0, len(table))))
        self._blocks[row, n_blocks : len(table)] = table[n_blocks:]
        self._rows[seq] = row, table, len(table)
        return row, len(table)

    def _free_row(self) -> int:
        if not self._free:
            n_rows = len(self._blocks)
            self._blocks = np.pad(self._blocks, ((0, n_rows), (0, 0)))
            self._free = list(range(n_rows, 2 * n_rows))
        return self._free.pop()


@dataclass(slots=True)
class PromptSpan:
    """Prompt tokens whose logprobs are asked for: those behind positions first to first + n - 1 of the sequence.

    row: the step's row of position first. reports: filled in by the executor.
    """

    seq: Sequence
    first: int
    n: int
    row: int
    reports: list[Report] = field(default_factory=list)


@dataclass
class Step:
    """A plan laid out: the rows of its sequences one behind the other, in its order. Nothing of it changes later."""

    plan: Plan
    block_size: int
    rows: np.ndarray  # [3, n_rows] int64: token id, position and flat row of the cache
    cu_seqlens_q: np.ndarray  # [n_seqs + 1] int32
    seqlens_k: np.ndarray  # [n_seqs] int32
    block_tables: np.ndarray  # [n_seqs, width] int32, 0 past an end
    unread: np.ndarray  # [n, 2] int64: a row whose token the host does not know yet, and its row of the last step
    sampled: list[int]  # places in the plan of the sequences that yield a token
    sampled_rows: np.ndarray  # [len(sampled)] int64, the rows that predict it
    prompt_spans: list[PromptSpan]

    @classmethod
    def of(cls, plan: Plan, tables: BlockTables, block_size: int, last: LastStep | None) -> Step:
        """Tokens that the sequences lack are those that `last` yields; the device fills them in."""
        token_ids: list[int] = []
        unread: list[tuple[int, int]] = []
        spans: list[PromptSpan] = []
        for seq, first, n in zip(plan.seqs, plan.firsts, plan.counts, strict=True):
            ids = seq.token_ids
            if first < seq.n_prompt - 1 and seq.params.prompt_logprobs is not None:
                spans += _prompt_spans(seq, first, n, len(token_ids))
            if n > 1:
                token_ids += ids[first : first + n]
            elif first < len(ids) or last is None:
                token_ids.append(ids[first])
            else:
                unread.append((len(token_ids), last.row_of[seq]))
                token_ids.append(0)
        firsts, n_seqs, n_rows = np.array(plan.firsts), len(plan.seqs), len(token_ids)
        if n_rows == n_seqs:
            starts = np.arange(n_seqs + 1, dtype=np.int32)
            owners, positions, lengths = starts[:-1], firsts, firsts + 1
        else:
            counts, starts = np.array(plan.counts), np.zeros(n_seqs + 1, np.int32)
            np.cumsum(counts, out=starts[1:])
            owners, lengths = np.repeat(np.arange(n_seqs), counts), firsts + counts
            positions = np.arange(n_rows) + (firsts - starts[:-1])[owners]
        block_tables = tables.of(plan.seqs)
        rows = np.empty((3, n_rows), np.int64)
        rows[0], rows[1], rows[2] = token_ids, positions, block_tables[owners, positions // block_size]
        rows[2] = rows[2] * block_size + positions % block_size
        return cls(
            plan=plan,
            block_size=block_size,
            rows=rows,
            cu_seqlens_q=starts,
            seqlens_k=lengths.astype(np.int32),
            block_tables=block_tables,
            unread=np.array(unread, np.int64).reshape(-1, 2),
            sampled=[i for i, yields in enumerate(plan.yields) if yields],
            sampled_rows=starts[1:][plan.yields].astype(np.int64) - 1,
            prompt_spans=spans,
        )

    @property
    def n_rows(self) -> int:
        return self.rows.shape[1]

    @cached_property
    def tiles(self) -> np.ndarray:
        """`kernels.prefill_tiles` of the pieces of more than one token."""
        if self.n_rows == len(self.seqlens_k):
            return np.empty((0, 2), np.int32)
        return kernels.prefill_tiles(self.cu_seqlens_q, self.seqlens_k)

    @property
    def logit_rows(self) -> np.ndarray:
        """[n] int64: the sampled rows, then those of the prompt spans."""
        if not self.prompt_spans:
            return self.sampled_rows
        return np.concatenate((self.sampled_rows, *(np.arange(s.row, s.row + s.n) for s in self.prompt_spans)))


def _prompt_spans(seq: Sequence, first: int, n: int, row: int) -> list[PromptSpan]:
    """The span among n tokens of a prompt, from position first and the step's row `row` on, if there is one.

    The row of position p predicts p + 1. A position reported before a preemption is not reported again.
    """
    begin, end = max(first, len(seq.prompt_logprobs)), min(first + n, seq.n_prompt - 1)
    return [PromptSpan(seq, begin, end - begin, row + begin - first)] if begin < end else []


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on the device, with a row for each token to compute."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    kv_index: Tensor  # [rows] int64, flat row of the cache
    attention: kernels.AttentionPlan  # which rows and cache blocks belong together
    logit_rows: Tensor  # [n] int64, rows whose logits are made

    @classmethod
    def of(cls, step: Step, logit_rows: np.ndarray, device: torch.device, last: LastStep | None) -> Batch:
        """last: has the tokens that are not read yet."""
        rows, logits_of, unread = kernels.to_device(device, step.rows, logit_rows, step.unread)
        token_ids, positions, kv_index = rows.unbind(0)
        if last is not None and len(unread):
            last.fill(token_ids, *unread.unbind(1))
        starts, lengths, tables = step.cu_seqlens_q, step.seqlens_k, step.block_tables
        attention = kernels.plan_attention(starts, lengths, tables, step.block_size, device)
        return cls(token_ids, positions, kv_index, attention, logits_of)
