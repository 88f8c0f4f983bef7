"""Make Triton's interpreter (3.6, 3.7) compute what a GPU computes. Imported by conftest.py before any kernel runs.

What the plain interpreter gets wrong, and this module puts right, so that the kernels need no branch for tests:
- bf16 is held as raw uint16, so products, comparisons and sums are garbage: here its arithmetic goes through fp32;
- casts to bf16 truncate: here they round to nearest even;
- dots add in whatever order numpy likes: here in ascending k, sixteen products at a time, each time rounded to fp32, as
  the matrix units do for 16-bit operands, so that tests for equal bits mean something;
- with numpy >= 2.4 and triton 3.6, loops with a tensor bound raise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import ReduceOps
from triton.runtime.interpreter import TensorHandle as Handle

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _is_bf16(handle: Handle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _values(handle: Handle) -> np.ndarray:
    """The numbers in a handle, as fp32."""
    if _is_bf16(handle):
        return (np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(handle.data, dtype=np.float32)


def _bf16(numbers: Any) -> Handle:
    wide = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))
    raw = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return Handle(raw.reshape(np.shape(numbers)), tl.bfloat16)


def _dot(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a @ b, adding sixteen products at a time."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], 16):
        total = (total + a[..., k : k + 16] @ b[..., k : k + 16, :]).astype(np.float32)
    return total


def repair() -> None:
    """Replace the faulty methods of the interpreter, for the rest of this process."""
    plain_cast, plain_binary, plain_unary = Builder.cast_impl, Builder.binary_op, Builder.unary_op
    plain_reduce, plain_patch = ReduceOps.apply_impl, interpreter._patch_lang_tensor

    def cast(self: Builder, source: Handle, target: Any) -> Handle:
        if target.scalar == tl.bfloat16:
            return _bf16(_values(source))
        if _is_bf16(source):
            return Handle(_values(source).astype(interpreter._get_np_dtype(target.scalar)), target.scalar)
        return plain_cast(self, source, target)

    def binary(self: Builder, left: Handle, right: Handle, op: Any) -> Handle:
        if not (_is_bf16(left) and _is_bf16(right)) or op in _BITWISE:
            return plain_binary(self, left, right, op)
        result = op(_values(left), _values(right))
        return Handle(result, tl.int1) if result.dtype == bool else _bf16(result)

    def unary(self: Builder, source: Handle, op: Any) -> Handle:
        return _bf16(op(_values(source))) if _is_bf16(source) else plain_unary(self, source, op)

    def dot(self: Builder, a: Handle, b: Handle, total: Handle, *_: Any) -> Handle:
        return Handle(_dot(_values(a), _values(b), total.data), total.dtype.scalar)

    def reduce(self: ReduceOps, inputs: Any) -> Any:
        if len(inputs) != 1 or not _is_bf16(inputs[0].handle):
            return plain_reduce(self, inputs)
        raise NotImplementedError("a reduction over bf16: GPUs would add in bf16; widen to fp32 first")

    def patch(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    Builder.cast_impl = cast
    Builder.create_fp_to_fp = lambda self, source, target, rounding: cast(self, source, target)
    Builder.binary_op, Builder.unary_op, Builder.create_dot = binary, unary, dot
    Builder.get_bf16 = lambda self, value: _bf16(np.array([value]))
    ReduceOps.apply_impl = reduce
    interpreter._patch_lang_tensor = patch
