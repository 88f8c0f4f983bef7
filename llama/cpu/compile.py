"""What the compiled steps on the CPU share: how they are compiled, and small parts of a layer.

Calling operators, and storing what each leaves for the next, costs a small step as much time as reading its weights.
torch.compile (Inductor) makes one C++ function of several layers. Activations stay fp32 in it, so 16-bit models are
rounded less than by the plain path; fp32 models give the same tokens, near ties aside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from kernels import LinearWeight
from llama.model import Block

_OPTIONS: dict[str, str | int | bool] = {
    "size_asserts": False,  # of what the callers themselves hand over
    "assert_indirect_indexing": False,  # rows of the cache, which the scheduler gave out
    "cpp.enable_floating_point_contract_flag": "fast",
}
# The most layers in one function, as far as their number can be divided: fewer calls, but longer compiling.
_GROUP_SIZES = (4, 3, 2, 1)
_numbers = itertools.count()


def compile_isolated(function: Any, is_checked: Callable[[str, str], bool], any_threads: bool) -> Any:
    """The function compiled, with only those guards (name, type) that `is_checked` picks.

    any_threads: loops are shared by the threads that torch has at the call; else long ones by those that it has now.
    """
    # Copy the code object: Dynamo's recompile limit is per code object. Rename it too: Dynamo keys its dynamic-shape
    # records by function name, so a second model would get symbolic sizes.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    guards = {"guard_filter_fn": lambda entries: [is_checked(guard.name, guard.guard_type) for guard in entries]}
    threads = {"cpp.dynamic_threads": any_threads}
    return torch.compile(copy, fullgraph=True, options=_OPTIONS | guards | threads)


def group_layers(
    blocks: list[Block[LinearWeight]], tensor_of: Callable[[LinearWeight], Tensor]
) -> list[list[Block[Tensor]]]:
    """The layers of each call, with every matrix in the form that is multiplied."""
    size = next(size for size in _GROUP_SIZES if len(blocks) % size == 0)
    layers: list[Block[Tensor]] = [
        Block(*(tensor_of(part) if isinstance(part, LinearWeight) else part for part in block)) for block in blocks
    ]
    return [layers[i : i + size] for i in range(0, len(layers), size)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kernels.rms_norm`. x, residual: [..., dim] fp32. weight: [dim]. Returns fp32 of the same shape."""
    if residual is not None:
        x = residual + x
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float(), x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., heads, head_dim] fp32. cos, sin: [..., head_dim / 2], to be broadcast. Returns the same shape as x."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """`kernels.swiglu`. gate_up: [..., 2 * ffn] fp32. Returns [..., ffn] fp32."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up
