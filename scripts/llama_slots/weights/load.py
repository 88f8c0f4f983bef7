"""How fast a checkpoint becomes parameters, beside a plain copy of the same bytes; both from the page cache.

Loader and copy take turns. The files are read once before each turn, so that it begins with all of them in the page
cache. If the machine cannot hold cache and weights at once, a turn drops what it has read from the cache; otherwise the
kernel would drop what is read next. The bytes that came from disk all the same are reported.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.cache import available_memory
from llama.checkpoint import load_parameters
from llama.errors import LoadError
from llama.tensor_file import CHUNK, TensorFile
from llama_slots.weights.source import GGUF, HF, Source

# The bytes read last stay in the cache, since the count of bytes read also counts other small files.
_DISTANCE = 64 << 20


@dataclass(frozen=True)
class Turn:
    """One pass. disk_bytes: what the kernel had to read from disk for it."""

    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class LoadSpeed:
    """rounds: (loader, plain copy). peak_host_bytes: of the process when it had loaded for the first time."""

    nbytes: int
    peak_host_bytes: int
    rounds: list[tuple[Turn, Turn]]

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes per second of the loader and of the copy, medians."""
        seconds = [statistics.median(turn.seconds for turn in side) for side in zip(*self.rounds, strict=True)]
        return self.nbytes / seconds[0], self.nbytes / seconds[1]

    @property
    def share(self) -> float:
        """Of the copy's speed; the median of the rounds' own shares."""
        return statistics.median(plain.seconds / ours.seconds for ours, plain in self.rounds)

    @property
    def most_from_disk(self) -> int:
        return max(turn.disk_bytes for pair in self.rounds for turn in pair)


def measure_load(source: Source, dtype: torch.dtype, device: torch.device, rounds: int) -> LoadSpeed:
    """One turn of each to warm up, then the rounds. Raises LoadError, CheckpointError."""
    if source.kind == GGUF:
        raise LoadError(source.path, "is GGUF, which the engine does not load; convert it first")

    def loader() -> object:
        return load_parameters(source.path, source.config, dtype, device, progress=False)

    def copy() -> object:
        return [_whole(path) for path in source.files]

    nbytes = sum(path.stat().st_size for path in source.files)
    # Meta's parts are read side by side, not one after the other, so there is no "behind".
    in_order = source.kind == HF or len(source.files) == 1
    drop = in_order and 2 * nbytes + (1 << 30) > available_memory(torch.device("cpu"))
    _turn(loader, source.files, drop)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _turn(copy, source.files, drop)
    pairs = [(_turn(loader, source.files, drop), _turn(copy, source.files, drop)) for _ in range(rounds)]
    return LoadSpeed(nbytes, peak, pairs)


def _whole(path: Path) -> torch.Tensor:
    """The bytes of a file, read in one call."""
    file = TensorFile(path)
    data = torch.empty(file.size, dtype=torch.uint8)
    file.read_into(0, memoryview(data.numpy().data))
    return data


def _turn(what: Callable[[], object], files: list[Path], drop: bool) -> Turn:
    gc.collect()
    buffer = memoryview(bytearray(CHUNK))
    for file in map(TensorFile, files):
        for at in range(0, file.size, CHUNK):
            file.read_into(at, buffer[: file.size - at])
    with _dropping_behind(files) if drop else nullcontext():
        before, started = _io("read_bytes"), time.perf_counter()
        loaded = what()
        seconds, from_disk = time.perf_counter() - started, _io("read_bytes") - before
    del loaded  # giving memory back is not loading
    return Turn(seconds, from_disk)


@contextmanager
def _dropping_behind(files: list[Path]) -> Iterator[None]:
    """Until the block ends, drop from the page cache what this process has read of the files, in their order."""
    ended, start = threading.Event(), _io("rchar")
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in files]

    def follow() -> None:
        while not ended.wait(0.02):
            behind = _io("rchar") - start - _DISTANCE
            for fd in fds:
                if behind > 0:
                    os.posix_fadvise(fd, 0, behind, os.POSIX_FADV_DONTNEED)
                behind -= os.fstat(fd).st_size

    follower = threading.Thread(target=follow, name="drop-behind")
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
        for fd in fds:
            os.close(fd)


def _io(name: str) -> int:
    """A count of this process. rchar: bytes that its calls have read; read_bytes: those that came from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
