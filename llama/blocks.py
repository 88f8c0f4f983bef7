"""`BlockPool`: which blocks of the KV cache are whose. Plain Python; it never sees the cache itself.

Every block is in one of three states:
- held: ref count >= 1, in that many block tables;
- idle: no owner, but its tokens are known and a prompt with the same start may still find it; the oldest go first;
- blank: no owner, content unknown.
Block 0 is the pad block: padded rows point at it, nobody is ever given it, and it stays zero.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PAD_BLOCK = 0
# The oldest 1 / _OLD of the idle blocks may be given up though others are blank, for room side by side.
_OLD = 8


class CachedBlock(NamedTuple):
    """What a full block holds: its key (a hash chained over every token before it) and its own tokens, to be sure."""

    key: bytes
    tokens: tuple[int, ...]


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: SHA-256 over its parent's key and its own tokens. The first parent is `root_key`."""
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()


def root_key(salt: str) -> bytes:
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


class BlockPool:
    """num_blocks blocks of block_size tokens each, the pad block among them."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self._refs = [0] * num_blocks
        self._blank = dict.fromkeys(range(num_blocks - 1, PAD_BLOCK, -1))  # taken from the end: low numbers first
        # 1: blank, and not reserved for the growth of the owner of the blocks before it. A hint for placing, no more.
        self._open = bytearray(b"\0" + b"\1" * (num_blocks - 1))
        # Block -> its number among all that became idle, oldest first. A plain dict is slow to find its first key.
        self._idle: OrderedDict[int, int] = OrderedDict()
        self._n_idled = 0
        self._cached: dict[int, CachedBlock] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def n_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def n_free(self) -> int:
        return len(self._blank) + len(self._idle)

    def blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    def allocate(self, after: int = PAD_BLOCK, room: int = 1) -> int:
        """A block for an owner. The caller makes sure that n_free is not 0.

        after: the owner's last block, or the pad block. room: how many blocks the owner may come to need: the CPU reads
        blocks that lie side by side without a copy.
        """
        block = self._place(after, room)
        if block in self._idle:
            self._forget(block)
        del self._blank[block]
        self._open[block] = 0
        self._refs[block] = 1
        return block

    def _place(self, after: int, room: int) -> int:
        """Try in turn: (1) the block right after `after`, if it is blank or old; (2) the first run of `room` unreserved
        blank blocks, and reserve the rest of it; (3) a run of the oldest idle blocks, which the prefix cache forgets,
        and reserve the rest of it; (4) any free block."""
        if after != PAD_BLOCK and (after + 1 in self._blank or self._is_old(after + 1)):
            return after + 1
        block = self._open.find(b"\1" * room)
        if block > PAD_BLOCK:
            self._open[block : block + room] = bytes(room)
            return block
        if 0 < room <= len(self._idle) // _OLD:
            last = first = next(iter(self._idle))  # an owner's blocks became idle from its last one down
            while first > last - room + 1 and (self._open[first - 1] or self._is_old(first - 1)):
                first -= 1
            for block in range(first, last + 1):
                if block in self._idle:
                    self._forget(block)
                self._open[block] = 0
            return first
        return next(reversed(self._blank)) if self._blank else next(iter(self._idle))

    def _forget(self, block: int) -> None:
        """An idle block becomes blank."""
        del self._idle[block]
        del self._by_key[self._cached.pop(block).key]
        self._blank[block] = None

    def _is_old(self, block: int) -> bool:
        number = self._idle.get(block)
        return number is not None and number < self._idle[next(iter(self._idle))] + len(self._idle) // _OLD

    def release(self, table: Iterable[int]) -> None:
        """Give back one owner's hold on each block of a table, the last block first, so that it is evicted first."""
        for block in reversed(list(table)):
            if self._refs[block] < 1:
                raise RuntimeError(f"block {block} released without an owner")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._cached:
                self._idle[block] = self._n_idled
                self._n_idled += 1
            else:
                self._blank[block] = None
                self._open[block] = 1
            self._reopen(block + 1)

    def publish(self, block: int, key: bytes, tokens: tuple[int, ...]) -> None:
        """Let prompts find a held block that is full and computed. A second one of equal content stays private."""
        if self.prefix_cache and key not in self._by_key:
            self._by_key[key] = block
            self._cached[block] = CachedBlock(key, tokens)

    def find(self, tokens: Sequence[int], salt_key: bytes) -> tuple[list[int], list[bytes]]:
        """Take hold of the longest run of cached blocks that a prompt starts with; its last token is never covered.

        Returns (blocks, their keys). The tokens are compared as well: a hash that collides is no hit.
        """
        blocks: list[int] = []
        keys: list[bytes] = []
        key, size = salt_key, self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            block_tokens = tuple(tokens[start : start + size])
            key = block_key(key, block_tokens)
            block = self._by_key.get(key)
            if block is None or self._cached[block].tokens != block_tokens:
                break
            if not self._refs[block]:
                del self._idle[block]
            self._refs[block] += 1
            blocks.append(block)
            keys.append(key)
        return blocks, keys

    def _reopen(self, block: int) -> None:
        """Blocks reserved for the growth of the owner before them are for everyone again, up to the next one in use."""
        while block in self._blank and not self._open[block]:
            self._open[block] = 1
            block += 1

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Audit the pool against all block tables in use. Raises RuntimeError, naming the block, on the first fault."""
        held = Counter(block for table in tables for block in table)
        for block, refs in enumerate(self._refs):
            if held[block] != refs:
                raise RuntimeError(f"block {block}: {held[block]} tables hold it, ref count is {refs}")
            places = (refs > 0) + (block in self._blank) + (block in self._idle)
            if places != (block != PAD_BLOCK):
                raise RuntimeError(f"block {block}: in {places} of the states held, idle and blank")
            if block in self._idle and block not in self._cached:
                raise RuntimeError(f"block {block}: idle, but its tokens are not known")
            if self._open[block] and block not in self._blank:
                raise RuntimeError(f"block {block}: offered to new owners, but not blank")
            if block in self._blank and block in self._cached:
                raise RuntimeError(f"block {block}: blank, but a prompt could still find it")
        if held[PAD_BLOCK]:
            raise RuntimeError("the pad block is in a block table")
        if len(self._by_key) != len(self._cached):
            raise RuntimeError(f"{len(self._by_key)} keys for {len(self._cached)} cached blocks")
        for key, block in self._by_key.items():
            if self._cached[block].key != key:
                raise RuntimeError(f"block {block}: found under a key that is not its own")
