"""Engines in processes of their own, so that the threads of one do not slow another, nor those of the bench.

OpenMP's workers stop spinning between loops when a process has more of them than cores, as two engines in one process
have.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.sides import Side


class Remote:
    """A side that answers from another process; an error there is raised here."""

    def __init__(self, connection: Connection, index: int, name: str) -> None:
        self._connection, self._index, self.name = connection, index, name

    def prefill(self, prompt: list[int]) -> float:
        return self._ask("prefill", prompt)

    def decode(self, prompt: list[int], n: int) -> float:
        return self._ask("decode", prompt, n)

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        return self._ask("batch", prompts, lengths, at_once)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self._ask("tokens", prompt, n)

    def _ask(self, method: str, *args: Any) -> Any:
        self._connection.send((self._index, method, args))
        return _answer(self._connection)


class RemoteSides:
    """`sides`: what make(*args) makes in a process of its own, which ends with the `with` block. Both are pickled.

    Each process freezes what is loaded out of the garbage collector's way, as serve.py does, whichever engine it holds.
    """

    def __init__(self, make: Callable[..., list[Side]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self.sides: list[Side] = [Remote(self._connection, i, name) for i, name in enumerate(_answer(self._connection))]

    def __enter__(self) -> list[Side]:
        return self.sides

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()


def _answer(connection: Connection) -> Any:
    """Raises what the other process raised, EOFError when it died."""
    value = connection.recv()
    if isinstance(value, Exception):
        raise value
    return value


def _serve(connection: Connection, make: Callable[..., list[Side]], args: tuple[Any, ...]) -> None:
    try:
        sides = make(*args)
    except Exception as error:
        connection.send(error)
        return
    gc.collect()
    gc.freeze()
    connection.send([side.name for side in sides])
    while True:
        try:
            index, method, values = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(sides[index], method)(*values))
        except Exception as error:
            connection.send(error)
