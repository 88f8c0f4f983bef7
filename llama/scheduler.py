"""`Scheduler`: which tokens of which sequences are computed next. Plain Python: no tensors, threads or clock.

    waiting --admit--> running --finish--> gone
       ^                  |
       `-----preempt------'

A plan is a list of (sequence, n): compute its next n tokens. A sequence yields a token when n reaches its last one, so
a chunk of a prompt and a decoded token are the same thing. Running sequences go first, then waiting ones, in order of
arrival. When blocks run out the youngest running sequence gives its own back and waits at the front with its tokens
kept; the oldest is never preempted, so some request always progresses.
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
    """seqs[i] computes its next counts[i] tokens. Decodes (n = 1, a token is yielded) come first."""

    seqs: list[Sequence] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(self.counts)

    def split(self) -> tuple[Plan, Plan]:
        half = len(self.seqs) // 2
        return Plan(self.seqs[:half], self.counts[:half]), Plan(self.seqs[half:], self.counts[half:])


class Scheduler:
    """Owns the pool and every unfinished sequence. `schedule` and `commit` alternate; `add`, `finish` come between."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_batch_seqs: int) -> None:
        self.pool = pool
        self.max_batch_tokens, self.max_batch_seqs = max_batch_tokens, max_batch_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.n_preemptions = 0
        self.n_prefix_queries = 0  # prompt tokens looked up in the prefix cache, and found there
        self.n_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seqs: Iterable[Sequence]) -> None:
        self.waiting.extend(seqs)

    def schedule(self) -> Plan:
        """The next step, never empty while there is work. Blocks for its tokens are allocated."""
        decodes, chunks = Plan(), Plan()
        budget = self.max_batch_tokens
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            i += 1
            if budget == 0:
                break
            n = min(len(seq.token_ids) - seq.num_computed, budget)
            if not self._reserve(seq, seq.num_computed + n):
                break  # seq itself was the youngest and is waiting again
            plan = decodes if n == 1 and seq.n_remaining == 1 else chunks
            plan.seqs.append(seq)
            plan.counts.append(n)
            budget -= n
        while budget and len(self.running) < self.max_batch_seqs:
            admitted = self._admit_next()
            if admitted is None:
                break
            n = min(admitted.n_remaining, budget)
            chunks.seqs.append(admitted)
            chunks.counts.append(n)
            budget -= n
        return Plan(decodes.seqs + chunks.seqs, decodes.counts + chunks.counts)

    def commit(self, plan: Plan, new_tokens: list[int | None]) -> None:
        """Book a step: new_tokens[i] is what plan.seqs[i] yielded, None where it yields nothing (yet, or any more).

        Sequences that ended are out of `running` and have their finish_reason set.
        """
        size = self.pool.block_size
        for seq, n, token in zip(plan.seqs, plan.counts, new_tokens, strict=True):
            if seq.finish_reason is not None:
                continue  # aborted or failed while it ran
            seq.num_computed += n
            if seq.num_computed >= (len(seq.keys) + 1) * size:
                self._publish(seq)
            if token is None:
                if seq.num_computed == len(seq.token_ids) >= seq.max_len:
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
        if seq is None:
            return None
        self._find_prefix(seq)
        whole = seq.preemptions >= MAX_PREEMPTIONS
        wanted = self.pool.blocks_for(seq.max_len if whole else len(seq.token_ids))
        missing = wanted - len(seq.block_table)
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

    def _publish(self, seq: Sequence) -> None:
        """Let later prompts find the blocks that this step filled."""
        if not self.pool.prefix_cache:
            return
        size = self.pool.block_size
        while (len(seq.keys) + 1) * size <= seq.num_computed:
            start = len(seq.keys) * size
            own = tuple(seq.token_ids[start : start + size])
            key = block_key(seq.keys[-1] if seq.keys else root_key(seq.request.salt), own)
            self.pool.publish(seq.block_table[len(seq.keys)], key, own)
            seq.keys.append(key)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table, seq.keys = [], []


def _may_start(seq: Sequence) -> bool:
    """A choice waits for its leader to compute their prompt, unless the leader is gone."""
    leader = seq.leader
    return leader is None or leader.num_computed >= seq.n_prompt or leader.finish_reason is not None
