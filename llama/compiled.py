"""What steps through torch.compile have in common, on the CPU: how they are compiled, and small parts of a layer.

Operators cost a small step as much as its weights' way through memory: their calls, and what each leaves for the next
to read. torch.compile (Inductor) makes one C++ function of several layers. Activations stay fp32 in it, so 16-bit
models are rounded less than by the plain path; in fp32 the same tokens, near ties aside.
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
    "size_asserts": False,  # of what the callers themselves hand over; 4 us a call
    "assert_indirect_indexing": False,  # rows of the cache, which the scheduler gave out
    "cpp.enable_floating_point_contract_flag": "fast",
}
# So many layers are one function, as far as their number can be divided: a call takes as long as reading half a
# megabyte. With 4 instead of 1 a one-row step of 110M takes 3 to 5 per cent less, and compiling 3 seconds more.
_AT_ONCE = (4, 3, 2, 1)
_numbers = itertools.count()


def compile_apart(function: Any, is_checked: Callable[[str, str], bool], any_threads: bool) -> Any:
    """The function compiled, with guards only of those (name, type) that are to be checked before every call.

    any_threads: each loop is shared by as many threads as torch has at the call. Otherwise by those that it has now,
    and short loops are not shared.

    It gets code of its own, since Dynamo counts compilations by code object and refuses a ninth engine; and a name of
    its own, by which Dynamo notes what sizes differ between calls: those of a second model would not be constants.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    guards = {"guard_filter_fn": lambda found: [is_checked(guard.name, guard.guard_type) for guard in found]}
    threads = {"cpp.dynamic_threads": any_threads}
    return torch.compile(own, fullgraph=True, options=_OPTIONS | guards | threads)


def weights_of_calls(blocks: list[Block], form: Callable[[LinearWeight], Tensor]) -> list[list[list[Tensor]]]:
    """For each call, its layers' weights: both norms, then qkv, o, gate_up and down in the form that is multiplied."""
    n = next(n for n in _AT_ONCE if len(blocks) % n == 0)
    layers = [
        [b.attn_norm, b.mlp_norm, *(form(matrix) for matrix in (b.qkv_proj, b.o_proj, b.gate_up_proj, b.down_proj))]
        for b in blocks
    ]
    return [layers[i : i + n] for i in range(0, len(layers), n)]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.rms_norm`. x: [..., dim] fp32. weight: [dim]. Returns the same shape as x, fp32."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., heads, head_dim] fp32. cos, sin: [..., head_dim / 2], to be broadcast. Returns the same shape as x."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
