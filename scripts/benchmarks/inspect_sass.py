"""Compile the launches of any code for a card that is not there, and read the machine code.

    with capture(90) as launches:
        kernels.linear(torch.empty(16, 4096, dtype=torch.bfloat16, device="meta"), weight)

Ordinary wrappers run on `meta` tensors: nothing is computed, and each kernel is compiled with the arguments that its
wrapper passes. So a change of tiles, dtypes or alignment shows here. A wrapper that reads a tensor's value fails, as it
would while a CUDA graph is captured. Needs triton, no GPU and no CUDA toolkit.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_KIB = 1024
# Bytes of shared memory that a program may ask for, and that an SM has (CUDA programming guide, compute capabilities).
SHARED_PER_PROGRAM = {80: 163 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB}
_SHARED_PER_SM = {80: 164 * _KIB, 90: 228 * _KIB, 100: 228 * _KIB}
_REGISTERS, _WARPS = 65536, 64

# What is counted: our name for it, and how the opcode begins.
_OPCODES = {
    "mma": r"HMMA\.",
    "wgmma": r"HGMMA\.",
    "tcgen05": r"UTC[A-Z]*MMA",
    "copy": r"LDGSTS\.",
    "copy128": r"LDGSTS\.E\S*\.128",
    "tma_load": r"UTMALDG",
    "tma_store": r"UTMASTG",
    "load": r"LDG\.E",
    "load128": r"LDG\.E\S*\.128",
    "store": r"STG\.E",
    "store128": r"STG\.E\S*\.128",
    "atomic": r"(ATOMG?|REDG?)\.",
    "spill": r"(LDL|STL)\b",
}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)")  # address, predicate, opcode


class _OfflineDriver(DriverBase):
    """Answers what Triton asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled programs are kept by device: one "device" per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a card")


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, compile-time constants, grid, and the compiled program."""

    kernel: str
    constants: dict[str, Any]
    grid: tuple[int, ...]
    arch: int
    program: Any

    @property
    def code(self) -> str:
        """The same for launches of the same program."""
        return str(self.program.hash)


@contextlib.contextmanager
def capture(arch: int) -> Iterator[list[Launch]]:
    """Inside the block every launch is compiled for `arch` (80, 90, 100) and listed instead of run."""
    launches: list[Launch] = []
    run, before = JITFunction.run, driver._active

    def note(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Any:
        program = run(self, *args, grid=grid, warmup=True, **constants)
        launches.append(Launch(self.fn.__name__, constants, grid, arch, program))
        return program

    JITFunction.run = note
    driver.set_active(_OfflineDriver(arch))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before


@dataclass(frozen=True)
class Report:
    """What the machine code of one program is made of. per_sm: how many programs an SM holds at once."""

    registers: int
    stack: int
    shared: int
    warps: int
    per_sm: int
    instructions: int
    counts: Counter[str]


def inspect(launch: Launch) -> Report:
    """Disassemble a launch's program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.program.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    opcodes = Counter(_INSTRUCTION.findall(text))
    if not usage or not opcodes:
        raise RuntimeError(f"cuobjdump's answer about {launch.kernel} is not understood:\n{text[:500]}")
    registers, stack = int(usage[1]), int(usage[2])
    counts = Counter(
        {name: sum(n for op, n in opcodes.items() if re.match(begin, op)) for name, begin in _OPCODES.items()}
    )
    shared, warps = launch.program.metadata.shared, launch.program.metadata.num_warps
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in blocks of 256 per warp
    per_sm = min(_REGISTERS // per_warp // warps, _SHARED_PER_SM[launch.arch] // (shared + _KIB), _WARPS // warps, 32)
    return Report(registers, stack, shared, warps, per_sm, opcodes.total(), counts)


def inspect_all(launches: list[Launch]) -> dict[str, Report]:
    """Program -> report, each program once. In threads: they wait for other processes."""
    programs = {launch.code: launch for launch in launches}
    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(inspect, programs.values()), strict=True))
