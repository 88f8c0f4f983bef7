"""`Scheduler`: which tokens of which sequences are computed next. Plain Python: no tensors, threads or clock.

    waiting --admit--> running --finish--> gone
       ^                  |
       `-----preempt------'

A plan is a list of (sequence, n): compute its next n tokens. A sequence yields a token when n reaches its last one, so
a chunk of a prompt and a decoded token are the same thing. Running sequences go first, then waiting ones, in order of
arrival. When blocks run out the youngest running sequence gives its own back and waits at the front with its tokens
kept; the oldest is never preempted, so some request always progresses.

A step may be planned while the one before it runs: a sequence then computes the token that it is about to yield. If
that token ends it, its row is computed for nothing and `commit` skips it. Freed blocks may be reused at once: the
device runs steps in order, so the new owner writes after the old one. Only blocks that a committed step has filled are
published to the prefix cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from llama.blocks import PAD_BLOCK, BlockPool, block_key, root_key
from llama.sequence import FinishReason, Sequence

# A sequence preempted this often comes back only with blocks for its whole remaining length, and then stays.
MAX_PREEMPTIONS = 3


@dataclass(slots=True)
class Plan:
    """seqs[i] computes counts[i] tokens from position firsts[i] on; yields[i]: it yields a token then.

    Decodes (one token computed, one yielded) come first. A token that its sequence lacks is the one that the step
    before yields.
    """

    seqs: list[Sequence] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    yields: list[bool] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(self.counts)

    @property
    def needs_sync(self) -> bool:
        """Whether the step after this one cannot be launched before this one's tokens are known to the host."""
        return any(seq.request.params.counts_tokens for seq in self.seqs)

    def add(self, seq: Sequence, first: int, count: int, yields: bool) -> None:
        self.seqs.append(seq)
        self.firsts.append(first)
        self.counts.append(count)
        self.yields.append(yields)

    def split(self) -> tuple[Plan, Plan]:
        half = len(self.seqs) // 2
        return self._part(range(half)), self._part(range(half, len(self.seqs)))

    def living(self) -> Plan:
        """The part whose sequences have not ended."""
        return self._part([i for i, seq in enumerate(self.seqs) if seq.finish_reason is None])

    def _part(self, places: Iterable[int]) -> Plan:
        part = Plan()
        for i in places:
            part.add(self.seqs[i], self.firsts[i], self.counts[i], self.yields[i])
        return part


class Scheduler:
    """Owns the pool and every unfinished sequence. Each plan that is not empty is committed, in order, before the next
    but one is made. `schedule` counts what it plans as computed (`num_computed`); `commit` brings the tokens."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_batch_seqs: int) -> None:
        self.pool = pool
        self.max_batch_tokens, self.max_batch_seqs = max_batch_tokens, max_batch_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.n_planned = self.n_committed = 0  # plans
        self.n_preemptions = 0
        self.n_prefix_queries = 0  # prompt tokens looked up in the prefix cache, and found there
        self.n_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seqs: Iterable[Sequence]) -> None:
        self.waiting.extend(seqs)

    def schedule(self) -> Plan:
        """The next step; its blocks are allocated. Empty only without work, or until the last one is committed."""
        decodes, chunks = Plan(), Plan()
        budget = self.max_batch_tokens
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            i += 1
            if budget == 0:
                break
            first = seq.num_computed
            n = min(len(seq.token_ids) - first, budget)
            if n <= 0:  # what it computes next is being sampled
                if first + 1 >= seq.max_len:
                    continue  # and ends it
                n = 1
            if not self._reserve(seq, first + n):
                break  # seq itself was the youngest and is waiting again
            self._book(seq, n, decodes if n == 1 and first + 1 >= len(seq.token_ids) else chunks)
            budget -= n
        while budget and len(self.running) < self.max_batch_seqs:
            admitted = self._admit_next()
            if admitted is None:
                break
            n = min(len(admitted.token_ids) - admitted.num_computed, budget)
            self._book(admitted, n, chunks)
            budget -= n
        plan = Plan(
            decodes.seqs + chunks.seqs,
            decodes.firsts + chunks.firsts,
            decodes.counts + chunks.counts,
            decodes.yields + chunks.yields,
        )
        self.n_planned += bool(plan.seqs)
        return plan

    def commit(self, plan: Plan, new_tokens: list[int | None]) -> None:
        """Append new_tokens[i] to plan.seqs[i], None where it yields nothing, and finish the sequences that end."""
        self.n_committed += 1
        size = self.pool.block_size
        for seq, first, n, token in zip(plan.seqs, plan.firsts, plan.counts, new_tokens, strict=True):
            if seq.finish_reason is not None:
                continue  # it ended with the step before, or was aborted or failed while it ran
            # num_computed is 0 if it was preempted meanwhile; its blocks are no longer those that the step filled.
            if first + n >= (len(seq.keys) + 1) * size and seq.num_computed:
                self._publish(seq, first + n)
            if token is None:
                if first + n == len(seq.token_ids) >= seq.max_len:
                    self.finish(seq, FinishReason.LENGTH)
                continue
            seq.token_ids.append(token)
            if token in seq.stop_ids and seq.n_generated > seq.params.min_tokens:
                self.finish(seq, FinishReason.STOP)
            elif len(seq.token_ids) >= seq.max_len:
                self.finish(seq, FinishReason.LENGTH)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is; its blocks go back. Does nothing but overrule the reason when it has ended."""
        if seq.finish_reason is None:
            if seq in self.running:
                self.running.remove(seq)
            else:
                self.waiting.remove(seq)
            self._release(seq)
        seq.finish_reason = reason

    def preempt_youngest(self) -> Sequence | None:
        """Send the running sequence that was admitted last back to the front of the queue, its tokens kept."""
        if not self.running:
            return None
        seq = self.running.pop()
        self._release(seq)
        seq.num_computed = 0
        seq.preemptions += 1
        self.n_preemptions += 1
        self.waiting.appendleft(seq)
        return seq

    def check(self) -> None:
        """Audit the pool against every table. Raises RuntimeError on a fault."""
        self.pool.check(seq.block_table for seq in (*self.running, *self.waiting))

    def _book(self, seq: Sequence, n: int, plan: Plan) -> None:
        first = seq.num_computed
        seq.num_computed = end = first + n
        seq.last_plan = self.n_planned + 1
        plan.add(seq, first, n, len(seq.token_ids) <= end < seq.max_len)

    def _reserve(self, seq: Sequence, n_tokens: int) -> bool:
        """Blocks for the first n_tokens of a running sequence, taken from the youngest if need be."""
        missing = self.pool.blocks_for(n_tokens) - len(seq.block_table)
        while missing > self.pool.n_free:
            if self.preempt_youngest() is seq:
                return False
        self._grow(seq, missing)
        return True

    def _admit_next(self) -> Sequence | None:
        """Move the first waiting sequence that may start to `running`; None when its blocks are not to be had yet."""
        seq = next((s for s in self.waiting if _may_start(s)), None)
        if seq is None or seq.last_plan > self.n_committed:
            return None  # nobody, or one preempted while a step computes it, whose token is to come
        self._find_prefix(seq)
        whole = seq.preemptions >= MAX_PREEMPTIONS
        missing = self.pool.blocks_for(seq.max_len if whole else len(seq.token_ids)) - len(seq.block_table)
        # Nor may those before it need its blocks as they grow, or it would be preempted once more.
        spare = sum(self.pool.blocks_for(s.max_len) - len(s.block_table) for s in self.running) if whole else 0
        if missing + spare > self.pool.n_free:
            self._release(seq)
            seq.num_computed = 0
            return None
        self._grow(seq, missing)
        self.waiting.remove(seq)
        self.running.append(seq)
        return seq

    def _find_prefix(self, seq: Sequence) -> None:
        # Prompt logprobs need the logits of every position, so those are computed whatever the cache holds.
        if not self.pool.prefix_cache or seq.params.prompt_logprobs is not None:
            return
        seq.block_table, seq.keys = self.pool.find(seq.token_ids, root_key(seq.request.salt))
        seq.num_computed = len(seq.block_table) * self.pool.block_size
        if not seq.preemptions:
            seq.num_cached = min(seq.num_computed, seq.n_prompt)
            self.n_prefix_queries += seq.n_prompt
            self.n_prefix_hits += seq.num_cached

    def _grow(self, seq: Sequence, n_blocks: int) -> None:
        table, whole = seq.block_table, self.pool.blocks_for(seq.max_len)
        for _ in range(n_blocks):
            table.append(self.pool.allocate(table[-1] if table else PAD_BLOCK, whole - len(table)))

    def _publish(self, seq: Sequence, n_tokens: int) -> None:
        """Let later prompts find the full blocks among the first n_tokens."""
        if not self.pool.prefix_cache:
            return
        size = self.pool.block_size
        while (len(seq.keys) + 1) * size <= n_tokens:
            start = len(seq.keys) * size
            tokens = tuple(seq.token_ids[start : start + size])
            key = block_key(seq.keys[-1] if seq.keys else root_key(seq.request.salt), tokens)
            self.pool.publish(seq.block_table[len(seq.keys)], key, tokens)
            seq.keys.append(key)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table, seq.keys = [], []


def _may_start(seq: Sequence) -> bool:
    """A choice waits for its leader to compute their prompt, unless the leader is gone."""
    leader = seq.leader
    if leader is None or leader.finish_reason is not None:
        return True
    return leader.num_computed >= seq.n_prompt and leader.n_generated > 0  # > 0: that step has been committed
