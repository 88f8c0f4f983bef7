"""BlockPool against a dictionary: share, release, publish, find, evict; the pool is audited after each step."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import llama.blocks
from llama.blocks import PAD_BLOCK, BlockPool, block_key, root_key

SIZE = 2
NUM_BLOCKS = 8
Path = tuple[str, *tuple[tuple[int, ...], ...]]  # salt, then the tokens of each block up to and with this one

salts = st.sampled_from(["", "key-1"])
block_tokens = st.tuples(st.integers(0, 1), st.integers(0, 1))


class Owner:
    """One table, and what is in its first blocks: those that were found or published."""

    def __init__(self, salt: str) -> None:
        self.table: list[int] = []
        self.path: Path = (salt,)
        self.key = root_key(salt)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.owners: list[Owner] = []
        self.blank = set(range(1, NUM_BLOCKS))
        self.idle: list[int] = []  # oldest first
        self.block_at: dict[Path, int] = {}
        self.path_of: dict[int, Path] = {}

    def owned(self) -> set[int]:
        return {block for owner in self.owners for block in owner.table}

    @rule(salt=salts)
    def arrive(self, salt: str) -> None:
        self.owners.append(Owner(salt))

    @precondition(lambda self: self.owners and (self.blank or self.idle))
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        after = owner.table[-1] if owner.table else PAD_BLOCK
        room = data.draw(st.integers(1, 3))
        block = self.pool.allocate(after, room)
        if after != PAD_BLOCK and after + 1 in self.blank:
            assert block == after + 1, "the neighbour was blank"
        forgotten = [idle for idle in self.idle if idle not in self.pool._idle]
        old = len(self.idle) // llama.blocks._OLD
        assert not forgotten or old or not self.blank, "few are idle: none is given up while others are blank"
        assert set(forgotten) <= set(self.idle[: max(old, 1)]), "the oldest go first"
        for idle in forgotten:
            self.idle.remove(idle)
            self.blank.add(idle)
            del self.block_at[self.path_of.pop(idle)]
        self.blank.remove(block)
        owner.table.append(block)

    @precondition(lambda self: any(len(o.table) >= len(o.path) for o in self.owners))
    @rule(data=st.data(), tokens=block_tokens)
    def publish(self, data: st.DataObject, tokens: tuple[int, ...]) -> None:
        owner = data.draw(st.sampled_from([o for o in self.owners if len(o.table) >= len(o.path)]))
        block = owner.table[len(owner.path) - 1]
        owner.key = block_key(owner.key, tokens)
        owner.path = (*owner.path, tokens)
        self.pool.publish(block, owner.key, tokens)
        if owner.path not in self.block_at:
            self.block_at[owner.path] = block
            self.path_of[block] = owner.path

    @rule(salt=salts, blocks=st.lists(block_tokens, max_size=4), rest=st.integers(0, SIZE))
    def find(self, salt: str, blocks: list[tuple[int, ...]], rest: int) -> None:
        tokens = [t for block in blocks for t in block] + [7] * rest
        if not tokens:
            return
        expected: list[int] = []
        path: Path = (salt,)
        for own in blocks[: (len(tokens) - 1) // SIZE]:  # the last token is never covered
            path = (*path, own)
            if path not in self.block_at:
                break
            expected.append(self.block_at[path])
        found, keys = self.pool.find(tokens, root_key(salt))
        assert found == expected
        assert len(keys) == len(found)
        owner = Owner(salt)
        owner.table, owner.path = found, (salt, *blocks[: len(found)])
        owner.key = keys[-1] if keys else owner.key
        self.idle = [block for block in self.idle if block not in found]
        self.owners.append(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        self.pool.release(owner.table)
        for block in reversed(owner.table):
            if block not in self.owned():
                if block in self.path_of:
                    self.idle.append(block)
                else:
                    self.blank.add(block)

    @precondition(lambda self: self.blank or self.idle)
    @rule(data=st.data())
    def release_without_owner(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([PAD_BLOCK, *sorted(self.blank), *self.idle]))
        with pytest.raises(RuntimeError, match=f"block {block} released without an owner"):
            self.pool.release([block])

    @invariant()
    def audit(self) -> None:
        self.pool.check(owner.table for owner in self.owners)
        assert PAD_BLOCK not in self.owned()
        assert self.pool.n_free == len(self.blank) + len(self.idle) == NUM_BLOCKS - 1 - len(self.owned())


@pytest.mark.parametrize("old", [8, 2])  # none of so few blocks counts as old, and half of them
def test_pool(old: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.blocks, "_OLD", old)
    run_state_machine_as_test(PoolMachine, settings=settings(max_examples=150, stateful_step_count=50, deadline=None))


class WatchedPool(BlockPool):
    """Looks at what each call of `allocate` takes, and what it makes the prefix cache forget."""

    def allocate(self, after: int = PAD_BLOCK, room: int = 1) -> int:
        idle, blank = list(self._idle), set(self._blank)
        block = super().allocate(after, room)
        assert block in idle or block in blank, "it was held"
        forgotten = set(idle) - set(self._idle)
        assert forgotten <= set(idle[: max(len(idle) // llama.blocks._OLD, 1)]), "the oldest go first"
        return block


def test_a_pool_that_has_been_used_whole() -> None:
    """Hundreds of prompts over few beginnings, several at a time: what is found is what was published, the audit holds,
    and of the idle ones only the oldest go."""
    hits = 0
    for seed in range(40):
        dice = random.Random(seed)
        pool, running = WatchedPool(dice.randrange(20, 120), 2), list[list[int]]()
        content: dict[int, tuple[int, ...]] = {}  # block -> every token up to its end, as computed by its last owner
        for _ in range(150):
            prompt = [dice.randrange(2) for _ in range(dice.randrange(1, 8))] + [dice.randrange(99) for _ in range(9)]
            room = dice.randrange(1, 12)
            while running and (pool.n_free < 20 or dice.random() < 0.3):
                pool.release(running.pop(dice.randrange(len(running))))
            if pool.n_free < 9:
                continue
            found, _ = pool.find(prompt, root_key(""))
            hits += len(found)
            assert [content[block] for block in found] == [tuple(prompt[: 2 * i + 2]) for i in range(len(found))]
            pool.release(found)
            table = publish_prompt(pool, prompt, room=room)
            content |= {table[i]: tuple(prompt[: 2 * i + 2]) for i in range(len(prompt) // 2)}
            running.append(table)
            pool.check(running)
    assert hits > 1000, "some look-ups must hit, or the test shows nothing"


def publish_prompt(pool: BlockPool, tokens: list[int], salt: str = "", room: int = 1) -> list[int]:
    """Compute a prompt as the scheduler would: find, allocate the rest, publish what is full. Returns the table."""
    table, keys = pool.find(tokens, root_key(salt))
    while len(table) < pool.blocks_for(len(tokens)):
        table.append(pool.allocate(table[-1] if table else PAD_BLOCK, room))
    for i in range(len(keys), len(tokens) // pool.block_size):
        own = tuple(tokens[i * pool.block_size : (i + 1) * pool.block_size])
        keys.append(block_key(keys[-1] if keys else root_key(salt), own))
        pool.publish(table[i], keys[-1], own)
    return table


def test_colliding_hashes_are_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash of 4 bits nearly every look-up meets a stranger's block; the tokens tell, ten pools over."""

    def four_bits(parent: bytes, tokens: tuple[int, ...]) -> bytes:
        return bytes([hashlib.sha256(parent + repr(tokens).encode()).digest()[0] & 15])

    monkeypatch.setattr(llama.blocks, "block_key", four_bits)
    monkeypatch.setitem(globals(), "block_key", four_bits)
    rng = random.Random(0)
    pool = BlockPool(40, 4)
    content: dict[int, tuple[int, ...]] = {}  # block -> every token up to its end, as computed by its last owner
    prompts = [[rng.randrange(32000) for _ in range(rng.randrange(4, 30))] for _ in range(30)]
    hits = 0
    for _ in range(400):
        prompt = rng.choice(prompts)
        found, _ = pool.find(prompt, root_key(""))
        hits += len(found)
        for i, block in enumerate(found):
            assert content[block] == tuple(prompt[: (i + 1) * 4])
        pool.release(found)
        table = publish_prompt(pool, prompt)
        for i in range(len(prompt) // 4):
            content[table[i]] = tuple(prompt[: (i + 1) * 4])
        pool.check([table])
        pool.release(table)
    assert hits > 50, "some look-ups must hit, or the test shows nothing"


def test_salts_do_not_share() -> None:
    pool = BlockPool(20, 2)
    table = publish_prompt(pool, [1, 2, 3, 4, 5], "one")
    assert pool.find([1, 2, 3, 4, 5], root_key("two")) == ([], [])
    assert pool.find([1, 2, 3, 4, 5], root_key("one"))[0] == table[:2]


def test_a_prompt_is_never_covered_whole() -> None:
    """Its last token must be computed, or there would be no logits to sample from."""
    pool = BlockPool(20, 2)
    table = publish_prompt(pool, [1, 2, 3, 4])
    assert pool.find([1, 2, 3, 4], root_key(""))[0] == table[:1]
    assert pool.find([1, 2, 3, 4, 5], root_key(""))[0] == table[:2]
    assert pool.find([1], root_key(""))[0] == []


def test_the_end_of_a_prefix_is_evicted_before_its_start() -> None:
    pool = BlockPool(4, 2)
    first, second, third = table = publish_prompt(pool, [1, 2, 3, 4, 5, 6])
    pool.release(table)
    assert [pool.allocate(), pool.allocate()] == [third, second]
    assert pool.find([1, 2, 3, 4, 5, 6], root_key(""))[0] == [first]


def test_old_blocks_are_given_up_side_by_side() -> None:
    """In a pool whose every block has been used, prompts with room to grow lie in one piece, each while it grows."""
    pool, others = BlockPool(281, 2), iter(range(10**6))
    for _ in range(30):  # 9 blocks of each become idle; the tenth is the next one's first
        pool.release(publish_prompt(pool, [next(others) for _ in range(19)]))
    kept = [next(others) for _ in range(19)]
    pool.release(publish_prompt(pool, kept))
    tables: list[list[int]] = [[] for _ in range(8)]
    for _ in range(3):
        for table in tables:
            table.append(pool.allocate(table[-1] if table else PAD_BLOCK, 3 - len(table)))
    assert all(table == list(range(table[0], table[0] + 3)) for table in tables), tables
    pool.check(tables)
    assert len(pool.find(kept, root_key(""))[0]) == 9, "the newest prefix is still there"


def test_without_a_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    pool.release(publish_prompt(pool, [1, 2, 3, 4, 5]))
    assert pool.find([1, 2, 3, 4, 5], root_key("")) == ([], [])
    assert pool.n_free == 3


def test_all_blocks_but_the_pad_block_are_handed_out() -> None:
    pool = BlockPool(9, 4)
    assert sorted(pool.allocate() for _ in range(pool.n_usable)) == list(range(1, 9))
    assert pool.n_free == 0


@pytest.mark.parametrize(
    "tables, message",
    [
        ([[1, 2]], "block 3: 0 tables hold it, ref count is 1"),
        ([[1, 2, 3], [3]], "block 3: 2 tables hold it, ref count is 1"),
        ([[0, 1, 2, 3]], "block 0: 1 tables hold it, ref count is 0"),
        ([[1, 2, 3, 4]], "block 4: 1 tables hold it, ref count is 0"),
    ],
)
def test_the_audit_sees_a_leak_an_alias_and_the_pad_block(tables: list[list[int]], message: str) -> None:
    pool = BlockPool(6, 2)
    held = [pool.allocate() for _ in range(3)]
    pool.check([held])
    with pytest.raises(RuntimeError, match=message):
        pool.check(tables)
