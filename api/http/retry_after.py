"""`RetryAfter`: when those who found no free slot should come back."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from api.errors import MAX_RETRY_AFTER, SOON

MAX_EXPECTED = 4096


class RetryAfter:
    """Spreads those who were refused: each is told a later time than those before it that are not back yet."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expected: list[float] = []  # when the refused will be back; a heap

    def forget(self) -> None:
        """Nobody is expected: whoever comes now finds a slot."""
        self._expected.clear()

    def seconds(self, until_free: Callable[[int], float]) -> float:
        """What to tell the next one. until_free(n): seconds until slots are free for n others and this one."""
        now = self._clock()
        while self._expected and self._expected[0] <= now:
            heapq.heappop(self._expected)
        # A little late is better than a little early: clients give up after a few refusals.
        seconds = min(1.1 * until_free(len(self._expected)) + SOON, MAX_RETRY_AFTER)
        if len(self._expected) < MAX_EXPECTED:
            heapq.heappush(self._expected, now + seconds)
        return seconds
